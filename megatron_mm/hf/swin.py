"""Swin V2 (arXiv:2111.09883) in plain torch, over images and, with windows in time as well, over clips.

Weights have the names of transformers' Swinv2; the patch embedding has a kernel in time, and the position MLP reads the
offset in time before those of height and width. An image is a clip of one frame. It needs torch only, and serves as the
reference for the training code.

Shapes: V clips, F frames, T temporal patches, H and W patches of a side, C width, M tokens of a window, N heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class SwinPatchEmbeddings(nn.Module):
    """Patches that do not overlap; a clip shorter than a patch has its last frame repeated."""

    def __init__(self, width, temporal_patch_size, patch_size):
        super().__init__()
        kernel = (temporal_patch_size, patch_size, patch_size)
        self.projection = nn.Conv3d(3, width, kernel_size=kernel, stride=kernel)

    def forward(self, pixel_values):
        missing = self.projection.kernel_size[0] - pixel_values.shape[1]
        if missing > 0:
            last = pixel_values[:, -1:].expand(-1, missing, -1, -1, -1)
            pixel_values = torch.cat([pixel_values, last], dim=1)
        return self.projection(pixel_values.transpose(1, 2).to(self.projection.weight.dtype)).movedim(1, -1)


class SwinEmbeddings(nn.Module):
    """Patches and LayerNorm."""

    def __init__(self, width, temporal_patch_size, patch_size, epsilon):
        super().__init__()
        self.patch_embeddings = SwinPatchEmbeddings(width, temporal_patch_size, patch_size)
        self.norm = nn.LayerNorm(width, eps=epsilon)

    def forward(self, pixel_values):
        return self.norm(self.patch_embeddings(pixel_values))


class SwinSelfAttention(nn.Module):
    """Scaled cosine attention within a window, with a bias from the log-spaced offset of each pair of tokens."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.logit_scale = nn.Parameter(torch.full((num_heads,), math.log(10.0)))
        self.continuous_position_bias_mlp = nn.Sequential(
            nn.Linear(3, 512), nn.ReLU(), nn.Linear(512, num_heads, bias=False)
        )
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)

    def position_bias(self, window):
        """[N, M, M] for a window (time, height, width)."""
        weight = self.logit_scale
        axes = [torch.arange(n, device=weight.device) for n in window]
        place = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
        offset = (place[:, None] - place[None]).float()
        offset = offset * torch.tensor([8.0 / max(1, n - 1) for n in window], device=weight.device)
        offset = offset.sign() * torch.log2(offset.abs() + 1.0) / math.log2(8.0)
        bias = self.continuous_position_bias_mlp(offset.to(weight.dtype))
        return 16.0 * torch.sigmoid(bias).permute(2, 0, 1)

    def forward(self, x, window, mask):
        """Windows [B, M, C], mask [B, 1, M, M] or None -> [B, M, C]."""
        q, k, v = (f(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        scale = self.logit_scale.clamp(max=math.log(100.0)).exp()[:, None, None]
        bias = self.position_bias(window)[None]
        bias = bias.expand(len(x), -1, -1, -1) if mask is None else bias + mask.to(bias.dtype)
        x = F.scaled_dot_product_attention(F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1), v, bias, scale=1.0)
        return x.transpose(1, 2).flatten(2)


class SwinDense(nn.Module):
    """One linear layer, under the name that transformers gives it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)

    def forward(self, x):
        return self.dense(x)


class SwinAttention(nn.Module):
    """Attention and its output projection."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.self = SwinSelfAttention(width, num_heads)
        self.output = SwinDense(width, width)

    def forward(self, x, window, mask):
        return self.output(self.self(x, window, mask))


class SwinLayer(nn.Module):
    """Windowed attention and MLP, each normalised before it is added."""

    def __init__(self, width, num_heads, ffn_size, window, shifted, epsilon):
        super().__init__()
        self.window, self.shifted = window, shifted
        self.attention = SwinAttention(width, num_heads)
        self.layernorm_before = nn.LayerNorm(width, eps=epsilon)
        self.intermediate = SwinDense(width, ffn_size)
        self.output = SwinDense(ffn_size, width)
        self.layernorm_after = nn.LayerNorm(width, eps=epsilon)

    def forward(self, x):
        """[V, T, H, W, C] -> the same shape."""
        x = x + self.layernorm_before(self.attend(x))
        return x + self.layernorm_after(self.output(F.gelu(self.intermediate(x))))

    def attend(self, x):
        """Windows never exceed the grid; a dimension that one window covers is not shifted; the grid is padded."""
        size = x.shape[1:4]
        window = [min(w, n) for w, n in zip(self.window, size)]
        shift = [w // 2 if self.shifted and n > w else 0 for w, n in zip(self.window, size)]
        padded = [-(-n // w) * w for w, n in zip(window, size)]
        x = F.pad(x, [0, 0] + [end for n, p in zip(size[::-1], padded[::-1]) for end in (0, p - n)])
        mask = None
        if any(shift):
            # A token that the shift carried from one end of the grid to the other is no neighbour of those there.
            carried = [torch.arange(n, device=x.device) < s for n, s in zip(padded, shift)]
            code = torch.stack(torch.meshgrid(*carried, indexing="ij"), dim=-1)[None]
            code = self.cut(code.roll([-s for s in shift], dims=(1, 2, 3)), window)
            apart = (code[:, :, None] != code[:, None]).any(dim=-1)
            mask = torch.zeros(apart.shape, device=x.device).masked_fill(apart, float("-inf"))
            mask = mask.repeat(len(x), 1, 1)[:, None]
            x = x.roll([-s for s in shift], dims=(1, 2, 3))
        windows = self.attention(self.cut(x, window), window, mask)
        counts = [p // w for p, w in zip(padded, window)]
        x = windows.view(-1, *counts, *window, windows.shape[-1]).permute(0, 1, 4, 2, 5, 3, 6, 7)
        x = x.reshape(-1, *padded, windows.shape[-1]).roll(shift, dims=(1, 2, 3))
        return x[:, : size[0], : size[1], : size[2]]

    @staticmethod
    def cut(x, window):
        """[V, T, H, W, C] -> windows [B, M, C]."""
        t, h, w = window
        x = x.unflatten(3, (-1, w)).unflatten(2, (-1, h)).unflatten(1, (-1, t))
        return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(0, 3)


class SwinPatchMerging(nn.Module):
    """Two by two patches become one of twice the width: [V, T, H, W, C] -> [V, T, H/2, W/2, 2·C]."""

    def __init__(self, width, epsilon):
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(2 * width, eps=epsilon)

    def forward(self, x):
        four = [x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.norm(self.reduction(torch.cat(four, dim=-1)))


class SwinStage(nn.Module):
    """Layers of one width, of which every second shifts its windows, and the merging after them."""

    def __init__(self, width, depth, num_heads, ffn_size, window, epsilon, merge):
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinLayer(width, num_heads, ffn_size, window, i % 2 == 1, epsilon) for i in range(depth)
        )
        self.downsample = SwinPatchMerging(width, epsilon) if merge else None

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class SwinEncoder(nn.Module):
    """All stages."""

    def __init__(self, embed_dim, depths, num_heads, mlp_ratio, window, epsilon):
        super().__init__()
        widths = [embed_dim * 2**stage for stage in range(len(depths))]
        self.layers = nn.ModuleList(
            SwinStage(width, depth, heads, int(width * mlp_ratio), window, epsilon, merge=stage < len(depths) - 1)
            for stage, (width, depth, heads) in enumerate(zip(widths, depths, num_heads))
        )

    def forward(self, x):
        for stage in self.layers:
            x = stage(x)
        return x


class SwinTower(nn.Module):
    """Images or clips to memory."""

    def __init__(
        self,
        *,
        embed_dim,
        depths,
        num_heads,
        mlp_ratio,
        patch_size,
        temporal_patch_size,
        window_size,
        temporal_window_size,
        layernorm_epsilon,
    ):
        super().__init__()
        window = (temporal_window_size, window_size, window_size)
        self.embeddings = SwinEmbeddings(embed_dim, temporal_patch_size, patch_size, layernorm_epsilon)
        self.encoder = SwinEncoder(embed_dim, depths, num_heads, mlp_ratio, window, layernorm_epsilon)
        self.layernorm = nn.LayerNorm(embed_dim * 2 ** (len(depths) - 1), eps=layernorm_epsilon)

    def forward(self, pixel_values):
        """Images [V, 3, size, size] or clips [V, F, 3, size, size] -> [V, T·H·W, C], the last stage's tokens."""
        if pixel_values.dim() == 4:
            pixel_values = pixel_values[:, None]
        return self.layernorm(self.encoder(self.embeddings(pixel_values))).flatten(1, 3)
