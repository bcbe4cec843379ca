"""What the exported models of all systems share: decoder layers, and attention to a memory.

The decoder is Llama's (RMSNorm, rotary positions, grouped queries, SwiGLU). A memory is what media have become: its
keys and values are computed once and kept in a `MemoryCache` (exported_model.py) beside the growing ones of the text,
under a mask of the positions that exist. One row of a batch is one document with its own media, padded on either side.
It needs torch and transformers only.

Shapes: B rows, T tokens, M memory positions of a row, C width, d width of a head.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .exported_model import check_positions

# --------------------------------------------------------------------------------------------------------- attention


def split_heads(x, head_dim):
    """[B, T, heads·d] -> [B, heads, T, d]."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def join_heads(x):
    """[B, heads, T, d] -> [B, T, heads·d]."""
    return x.transpose(1, 2).flatten(2)


def attend(q, k, v, mask=None, is_causal=False):
    """Grouped-query attention of [B, heads, T, d] on [B, groups, S, d]."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)


def positions_and_mask(input_ids, attention_mask, position_ids, past, causal=True, cache_position=None):
    """Positions [B or 1, T] that count real tokens, and the mask of self-attention (None: causal, nothing padded).

    Args:
        attention_mask: [B, past + T], 1 for real tokens; None: all are.
        position_ids: [B or 1, T]; None: they are counted here.
        past: tokens in the cache.
        causal: tokens see earlier ones only; otherwise both sides.
        cache_position: [T], places in cache and input, where the caller says them.

    Raises:
        ValueError: mask or positions speak of tokens that cache and input do not hold.
    """
    batch, length = input_ids.shape
    check_positions(position_ids, past, length, cache_position)
    if attention_mask is None and ((past > 0 and length > 1) or not causal):
        attention_mask = input_ids.new_ones(batch, past + length)
    if position_ids is None:
        if attention_mask is None:
            position_ids = torch.arange(past, past + length, device=input_ids.device)[None]
        else:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    return position_ids, None if attention_mask is None else self_attention_mask(attention_mask, past, length, causal)


def self_attention_mask(attention_mask, past, length, causal=True):
    """[B, past + T] of real tokens -> [B, 1, T, past + T]; padding attends to itself, so that no row is empty."""
    total = past + length
    if attention_mask.shape[1] != total:
        raise ValueError(f"attention_mask covers {attention_mask.shape[1]} tokens; cache and input hold {total}")
    queries = torch.arange(past, total, device=attention_mask.device)[:, None]
    keys = torch.arange(total, device=attention_mask.device)[None]
    seen = attention_mask[:, None, None].bool()
    return ((keys <= queries) & seen if causal else seen) | (keys == queries)


# ----------------------------------------------------------------------------------------------------- decoder layers


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_tables(position_ids, head_dim, base, dtype):
    """Cosines and sines [B, 1, T, d] of Llama's rotary positions (half rotation)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids[:, None, :, None].float() / base**exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class RotaryAttention(nn.Module):
    """Grouped-query self-attention without biases. With rotary positions it is causal unless a mask says otherwise;
    without them there are no positions, and all see all."""

    def __init__(self, size, num_heads, num_groups, layer_idx=None):
        super().__init__()
        self.head_dim, self.layer_idx = size // num_heads, layer_idx
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, num_groups * self.head_dim, bias=False)
        self.v_proj = nn.Linear(size, num_groups * self.head_dim, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, x, rotary, mask, cache):
        q, k, v = (split_heads(f(x), self.head_dim) for f in (self.q_proj, self.k_proj, self.v_proj))
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        causal = rotary is not None and mask is None and q.shape[2] > 1
        return self.o_proj(join_heads(attend(q, k, v, mask, causal)))


class SwiGLU(nn.Module):
    def __init__(self, size, intermediate_size):
        super().__init__()
        self.gate_proj = nn.Linear(size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Llama's layer, of a configuration with Llama's fields."""

    def __init__(self, config, layer_idx):
        super().__init__()
        size = config.hidden_size
        self.self_attn = RotaryAttention(size, config.num_attention_heads, config.num_key_value_heads, layer_idx)
        self.mlp = SwiGLU(size, config.intermediate_size)
        self.input_layernorm = RMSNorm(size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(size, config.rms_norm_eps)

    def forward(self, x, rotary, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


# ------------------------------------------------------------------------------------------------------------- memory


class MemoryAttention(nn.Module):
    """Grouped-query attention to a memory, without biases."""

    def __init__(self, size, num_heads, num_groups, memory_size, norm_eps=None):
        """`norm_eps` is given where queries and keys are normed, per head."""
        super().__init__()
        self.head_dim = size // num_heads
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(memory_size, num_groups * self.head_dim, bias=False)
        self.v_proj = nn.Linear(memory_size, num_groups * self.head_dim, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)
        self.q_norm = self.k_norm = None
        if norm_eps is not None:
            self.q_norm, self.k_norm = RMSNorm(self.head_dim, norm_eps), RMSNorm(self.head_dim, norm_eps)

    def project_memory(self, memory):
        """Memory [B, M, C] -> keys and values [B, groups, M, d]."""
        keys, values = (split_heads(f(memory), self.head_dim) for f in (self.k_proj, self.v_proj))
        return (keys if self.k_norm is None else self.k_norm(keys)), values

    def forward(self, x, keys, values, mask, reads):
        """[B, T, C] -> the same.

        Args:
            mask: [B, 1, 1, M], true where memory is to be read; None: all of it.
            reads: [B, T or 1, 1], 1 where a token reads and 0 where it gets nothing.
        """
        q = split_heads(self.q_proj(x), self.head_dim)
        q = q if self.q_norm is None else self.q_norm(q)
        return reads * self.o_proj(join_heads(attend(q, keys, values, mask)))


def memory_masks(memory_mask, dtype):
    """[B, M] of positions that exist -> the `mask` and `reads` [B, 1, 1] of MemoryAttention."""
    has_memory = memory_mask.any(dim=1, keepdim=True)
    # A row without memory reads everything and multiplies it by zero: an all-masked softmax would be NaN.
    mask = memory_mask | ~has_memory
    return None if mask.all() else mask[:, None, None], has_memory[..., None].to(dtype)


def cached_memory(cache, number, past, project, *memory):
    """Keys and values of memory layer `number`: from the cache once it holds tokens, else `project(*memory)`, kept."""
    if cache is not None and past > 0:
        return cache.memory[number]
    pair = project(*memory)
    if cache is not None:
        cache.memory[number] = pair
    return pair


def media_mask(name, mask, values):
    """[B] bool: rows that have a medium; without a mask all do.

    Raises:
        ValueError: mask and media have different numbers of rows.
    """
    if mask is None:
        return torch.ones(len(values), dtype=torch.bool, device=values.device)
    if tuple(mask.shape) != (len(values),):
        raise ValueError(f"{name} has shape {list(mask.shape)}; the media have {len(values)} rows")
    return mask.bool()


def spread_rows(values, mask):
    """Values of the rows that have a medium [N, …] -> [B, …], zero in the other rows."""
    if mask.all():
        return values
    full = values.new_zeros(len(mask), *values.shape[1:])
    full[mask] = values
    return full


def last_token(hidden, attention_mask):
    """The state of each row's last real token, [B, T, C] -> [B, C]."""
    if attention_mask is None:
        return hidden[:, -1]
    places = torch.arange(hidden.shape[1], device=hidden.device)
    last = (attention_mask[:, -hidden.shape[1] :].bool() * places).argmax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


# ------------------------------------------------------------------------------------------------------------ models


def kept_states(hidden, logits_to_keep):
    """The states of which logits are wanted: the last so many (0: all), or those at given places."""
    if isinstance(logits_to_keep, int):
        return hidden[:, -logits_to_keep:] if logits_to_keep else hidden
    return hidden[:, logits_to_keep]


def token_loss(logits, labels, num_items=None):
    """Loss of logits [B, T, V] against tokens [B, T], of which -100 is not counted: the mean, or, where Trainer says
    how many tokens its accumulated batches have (`num_items`), the sum over that number."""
    reduction = "mean" if num_items is None else "sum"
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction=reduction)
    return loss if num_items is None else loss / num_items


def next_token_loss(logits, labels, num_items=None):
    """`token_loss` of the next tokens; labels [B, T] are the tokens themselves."""
    return token_loss(logits[:, :-1], labels[:, 1:], num_items)


def contrastive_logits(first, second, log_scale, max_scale):
    """Scaled cosines [n, m] of embeddings [n, E] and [m, E]."""
    scale = log_scale.float().exp().clamp(max=max_scale)
    return scale * F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).t()


@torch.no_grad()
def initialize(module, std):
    """Initial weights of one module, where nothing is loaded."""
    if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        nn.init.normal_(module.weight, std=std)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.LayerNorm, RMSNorm)):
        nn.init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
