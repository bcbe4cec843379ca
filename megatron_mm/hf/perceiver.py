"""The latent transformer of Perceiver IO in plain torch (arXiv:2107.14795).

`PerceiverTower` lets learned latents read a memory (image and text, say) again and again; `PerceiverQueries` reads
outputs from them, one a learned query. It needs torch only, and serves as the reference for the training code.

Shapes: B rows, L latents, D their width, M positions of the memory, W its width, Q queries.
"""

import torch
import torch.nn.functional as F
from torch import nn


class PerceiverAttention(nn.Module):
    """Attention with biases, of queries to a memory."""

    def __init__(self, hidden_size, memory_width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(memory_width, hidden_size)
        self.v_proj = nn.Linear(memory_width, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def _heads(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x, memory, mask=None):
        """[B, L, D], [B, M, W], mask [B, M] (1 is visible; None: all) -> [B, L, D]; a row that sees nothing attends to
        nothing."""
        q, k, v = self._heads(self.q_proj(x)), self._heads(self.k_proj(memory)), self._heads(self.v_proj(memory))
        if mask is None:
            attended = F.scaled_dot_product_attention(q, k, v)
        else:
            sees = (mask > 0).any(dim=1)[:, None, None, None]
            visible = (mask > 0)[:, None, None] | ~sees
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible) * sees
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class PerceiverMLP(nn.Module):
    """Two linear maps with exact GELU between."""

    def __init__(self, hidden_size, ffn_hidden_size):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, ffn_hidden_size)
        self.fc2 = nn.Linear(ffn_hidden_size, hidden_size)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class PerceiverCrossLayer(nn.Module):
    """Pre-norm cross-attention and MLP."""

    def __init__(self, hidden_size, memory_width, num_heads, ffn_hidden_size, epsilon):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(hidden_size, eps=epsilon)
        self.layernorm_memory = nn.LayerNorm(memory_width, eps=epsilon)
        self.attention = PerceiverAttention(hidden_size, memory_width, num_heads)
        self.layernorm_after = nn.LayerNorm(hidden_size, eps=epsilon)
        self.mlp = PerceiverMLP(hidden_size, ffn_hidden_size)

    def forward(self, x, memory, mask=None):
        x = x + self.attention(self.layernorm_before(x), self.layernorm_memory(memory), mask)
        return x + self.mlp(self.layernorm_after(x))


class PerceiverSelfLayer(nn.Module):
    """Pre-norm self-attention and MLP."""

    def __init__(self, hidden_size, num_heads, ffn_hidden_size, epsilon):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(hidden_size, eps=epsilon)
        self.attention = PerceiverAttention(hidden_size, hidden_size, num_heads)
        self.layernorm_after = nn.LayerNorm(hidden_size, eps=epsilon)
        self.mlp = PerceiverMLP(hidden_size, ffn_hidden_size)

    def forward(self, x):
        normed = self.layernorm_before(x)
        x = x + self.attention(normed, normed)
        return x + self.mlp(self.layernorm_after(x))


class PerceiverBlock(nn.Module):
    """One look at the memory, and layers of thought about it."""

    def __init__(self, hidden_size, memory_width, num_heads, ffn_hidden_size, layers, epsilon):
        super().__init__()
        self.cross = PerceiverCrossLayer(hidden_size, memory_width, num_heads, ffn_hidden_size, epsilon)
        self.layers = nn.ModuleList(
            PerceiverSelfLayer(hidden_size, num_heads, ffn_hidden_size, epsilon) for _ in range(layers)
        )

    def forward(self, x, memory, mask):
        x = self.cross(x, memory, mask)
        for layer in self.layers:
            x = layer(x)
        return x


class PerceiverTower(nn.Module):
    """A memory to latents."""

    def __init__(
        self,
        *,
        num_latents,
        hidden_size,
        num_blocks,
        layers_per_block,
        num_attention_heads,
        ffn_hidden_size,
        layernorm_epsilon,
        memory_width,
    ):
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(num_latents, hidden_size))
        shape = (hidden_size, memory_width, num_attention_heads, ffn_hidden_size, layers_per_block, layernorm_epsilon)
        self.blocks = nn.ModuleList(PerceiverBlock(*shape) for _ in range(num_blocks))

    def forward(self, memory, mask=None):
        """[B, M, W], mask [B, M] (1 is visible; None: all) -> [B, L, D]."""
        x = self.latents.expand(memory.shape[0], -1, -1)
        for block in self.blocks:
            x = block(x, memory, mask)
        return x


class PerceiverQueries(nn.Module):
    """Latents to outputs, one a learned query, whose residual says which output is asked for."""

    def __init__(self, *, num_queries, hidden_size, num_attention_heads, ffn_hidden_size, layernorm_epsilon):
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(num_queries, hidden_size))
        self.cross = PerceiverCrossLayer(
            hidden_size, hidden_size, num_attention_heads, ffn_hidden_size, layernorm_epsilon
        )

    def forward(self, latents):
        """[B, L, D] -> [B, Q, D]."""
        return self.cross(self.queries.expand(latents.shape[0], -1, -1), latents)
