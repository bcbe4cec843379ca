"""Transformer-XL's text encoder in plain torch (arXiv:1901.02860): pre-norm, bidirectional within a segment.

`TransformerXLTower` turns tokens into memory for the other modules of an exported folder, segment by segment: tokens
see their own segment and the one before it, whose normed layer input is memory without gradient. It needs torch only,
and serves as the reference for the training code, which runs all segments at once.

Shapes: B rows, T tokens, L tokens of a segment, K keys of a segment (memory first), C width.
"""

import torch
import torch.nn.functional as F
from torch import nn


def distance_sinusoids(queries, keys, width, like):
    """[keys + queries, C] in the dtype and on the device of `like`: sines, then cosines, of the distances from a query
    to a key, from `keys` down to 1 - queries; the first of them no query has (see `by_key`)."""
    distances = torch.arange(keys, -queries, -1, dtype=torch.float32, device=like.device)
    scales = 10000.0 ** (torch.arange(0, width, 2, dtype=torch.float32, device=like.device) / width)
    angles = distances[:, None] / scales
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(like.dtype)


def by_key(scores, keys):
    """Scores of each query by distance, [..., L, K + L], to scores by key, [..., L, K]: each row starts one later."""
    queries, distances = scores.shape[-2:]
    return scores.flatten(-2)[..., queries:].unflatten(-1, (queries, distances - 1))[..., :keys]


class TransformerXLAttention(nn.Module):
    """Attention of one segment to itself and its memory; u and v are the tower's."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.r_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def _heads(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)

    def forward(self, segment, memory, visible, u, v):
        """[B, L, C], [B, K - L, C] and visible keys [B, K] -> [B, L, C]."""
        keys = torch.cat([memory, segment], dim=1)
        q, k, value = self._heads(self.q_proj(segment)), self._heads(self.k_proj(keys)), self._heads(self.v_proj(keys))
        r = self._heads(self.r_proj(distance_sinusoids(segment.shape[1], keys.shape[1], keys.shape[2], keys)))
        u, v = (bias.view(self.num_heads, 1, -1) for bias in (u, v))
        position = by_key((q + v) @ r.transpose(-1, -2), keys.shape[1])
        scores = ((q + u) @ k.transpose(-1, -2) + position) * q.shape[-1] ** -0.5
        hidden = ~visible & visible.any(dim=1, keepdim=True)  # padding after padding sees padding: nobody sees it
        attended = scores.masked_fill(hidden[:, None, None], float("-inf")).softmax(dim=-1) @ value
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class TransformerXLMLP(nn.Module):
    """Two linear maps with exact GELU between."""

    def __init__(self, hidden_size, ffn_hidden_size):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, ffn_hidden_size)
        self.fc2 = nn.Linear(ffn_hidden_size, hidden_size)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class TransformerXLLayer(nn.Module):
    """Pre-norm attention and MLP over a row of segments."""

    def __init__(self, hidden_size, num_heads, ffn_hidden_size, epsilon):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(hidden_size, eps=epsilon)
        self.attention = TransformerXLAttention(hidden_size, num_heads)
        self.layernorm_after = nn.LayerNorm(hidden_size, eps=epsilon)
        self.mlp = TransformerXLMLP(hidden_size, ffn_hidden_size)

    def forward(self, x, visible, segment_length, u, v):
        """[B, T, C], visible tokens [B, T] -> [B, T, C]."""
        normed, attended = self.layernorm_before(x), []
        for start in range(0, x.shape[1], segment_length):
            before, end = max(0, start - segment_length), start + segment_length
            memory = normed[:, before:start].detach()
            attended.append(self.attention(normed[:, start:end], memory, visible[:, before:end], u, v))
        x = x + torch.cat(attended, dim=1)
        return x + self.mlp(self.layernorm_after(x))


class TransformerXLTower(nn.Module):
    """Tokens to memory."""

    def __init__(
        self,
        *,
        num_layers,
        hidden_size,
        num_attention_heads,
        ffn_hidden_size,
        segment_length,
        vocab_size,
        layernorm_epsilon,
    ):
        super().__init__()
        self.segment_length = segment_length
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.u = nn.Parameter(torch.zeros(hidden_size))
        self.v = nn.Parameter(torch.zeros(hidden_size))
        self.layers = nn.ModuleList(
            TransformerXLLayer(hidden_size, num_attention_heads, ffn_hidden_size, layernorm_epsilon)
            for _ in range(num_layers)
        )
        self.layernorm = nn.LayerNorm(hidden_size, eps=layernorm_epsilon)

    def forward(self, input_ids, attention_mask=None):
        """Tokens [B, T], mask [B, T] (1 for tokens, 0 for padding; None: all are tokens) -> [B, T, C]. Segments are
        counted from the start of a row, so padding belongs at its end."""
        visible = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask > 0
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, visible, self.segment_length, self.u, self.v)
        return self.layernorm(x)
