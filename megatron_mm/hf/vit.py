"""The vision transformer of masked autoencoders in plain torch (arXiv:2111.06377), and its decoder.

`ViTTower` turns images into memory for the other modules of an exported folder; given noise it sees only the patches
whose noise is smallest, and `MAEDecoder` predicts the pixels of all. Weights have the names of transformers' ViTMAE;
positions are computed, not stored. It needs torch only, and serves as the reference for the training code.

Shapes: I images, P patches of an image, V visible patches, C width of the tower, X pixels of a patch (row, column,
channel).
"""

import torch
import torch.nn.functional as F
from torch import nn


def sine_cosine_positions(grid, width, like):
    """Positions [1 + grid², width] in the dtype and on the device of `like`: zero for the class token, then sines and
    cosines of a patch's column, then of its row."""
    step = torch.arange(width // 4, dtype=torch.float64, device=like.device) / (width // 4)
    place = torch.arange(grid * grid, device=like.device)
    column, row = (part[:, None] / 10000.0**step for part in (place % grid, place // grid))
    table = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)
    return torch.cat([torch.zeros_like(table[:1]), table]).to(like.dtype)


class FixedPositions:
    """The table above, computed at first use: buffers do not survive construction on the meta device."""

    def __init__(self, grid, width):
        self.grid, self.width, self.table = grid, width, None

    def __call__(self, like):
        table = self.table
        if table is None or table.device != like.device or table.dtype != like.dtype:
            table = self.table = sine_cosine_positions(self.grid, self.width, like)
        return table


class ViTAttention(nn.Module):
    """Bidirectional self-attention with biases."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x):
        q, k, v = (
            f(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ViTMLP(nn.Module):
    """Two linear maps with exact GELU between."""

    def __init__(self, hidden_size, ffn_hidden_size):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, ffn_hidden_size)
        self.fc2 = nn.Linear(ffn_hidden_size, hidden_size)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class ViTLayer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, hidden_size, num_heads, ffn_hidden_size, epsilon):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(hidden_size, eps=epsilon)
        self.attention = ViTAttention(hidden_size, num_heads)
        self.layernorm_after = nn.LayerNorm(hidden_size, eps=epsilon)
        self.mlp = ViTMLP(hidden_size, ffn_hidden_size)

    def forward(self, x):
        x = x + self.attention(self.layernorm_before(x))
        return x + self.mlp(self.layernorm_after(x))


class ViTPatchEmbeddings(nn.Module):
    """A strided convolution: [I, 3, size, size] -> [I, P, C]."""

    def __init__(self, hidden_size, patch_size):
        super().__init__()
        self.projection = nn.Conv2d(3, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixel_values):
        return self.projection(pixel_values.to(self.projection.weight.dtype)).flatten(2).transpose(1, 2)


class ViTEmbeddings(nn.Module):
    """Patches, positions, and the class token before them."""

    def __init__(self, hidden_size, patch_size, image_size):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(hidden_size))
        self.patch_embeddings = ViTPatchEmbeddings(hidden_size, patch_size)
        self._positions = FixedPositions(image_size // patch_size, hidden_size)

    def forward(self, pixel_values, shown):
        patches = self.patch_embeddings(pixel_values)
        patches = patches + self._positions(patches)[1:]
        if shown is not None:
            patches = patches.gather(1, shown[:, :, None].expand(-1, -1, patches.shape[2]))
        return torch.cat([self.cls_token.expand(patches.shape[0], 1, -1), patches], dim=1)


def shuffled_patches(noise):
    """Patches of each image [I, P] in the order of their noise; the first are visible, the others hidden."""
    return noise.argsort(dim=1, stable=True)


class ViTTower(nn.Module):
    """Images to memory."""

    def __init__(
        self,
        *,
        num_layers,
        hidden_size,
        num_attention_heads,
        ffn_hidden_size,
        patch_size,
        image_size,
        layernorm_epsilon,
    ):
        super().__init__()
        self.embeddings = ViTEmbeddings(hidden_size, patch_size, image_size)
        self.layers = nn.ModuleList(
            ViTLayer(hidden_size, num_attention_heads, ffn_hidden_size, layernorm_epsilon) for _ in range(num_layers)
        )
        self.layernorm = nn.LayerNorm(hidden_size, eps=layernorm_epsilon)

    def forward(self, pixel_values, noise=None, visible=None):
        """[I, 3, size, size] -> [I, 1 + P, C]; of the `visible` patches with the least noise [I, P]: [I, 1 + V, C]."""
        x = self.embeddings(pixel_values, None if noise is None else shuffled_patches(noise)[:, :visible])
        for layer in self.layers:
            x = layer(x)
        return self.layernorm(x)


class MAEDecoder(nn.Module):
    """Memory of visible patches to the pixels of all patches."""

    def __init__(
        self,
        *,
        tower_hidden_size,
        num_layers,
        hidden_size,
        num_attention_heads,
        ffn_hidden_size,
        patch_size,
        image_size,
        layernorm_epsilon,
    ):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(hidden_size))
        self.decoder_embed = nn.Linear(tower_hidden_size, hidden_size)
        self._positions = FixedPositions(image_size // patch_size, hidden_size)
        self.decoder_layers = nn.ModuleList(
            ViTLayer(hidden_size, num_attention_heads, ffn_hidden_size, layernorm_epsilon) for _ in range(num_layers)
        )
        self.decoder_norm = nn.LayerNorm(hidden_size, eps=layernorm_epsilon)
        self.decoder_pred = nn.Linear(hidden_size, 3 * patch_size**2)

    def forward(self, memory, noise):
        """Masked memory [I, 1 + V, C] and the noise [I, P] that masked it -> [I, P, X]."""
        x = self.decoder_embed(memory)
        masks = self.mask_token.expand(noise.shape[0], noise.shape[1], -1)
        shown = shuffled_patches(noise)[:, : x.shape[1] - 1, None].expand(-1, -1, x.shape[2])
        x = torch.cat([x[:, :1], masks.scatter(1, shown, x[:, 1:])], dim=1) + self._positions(x)
        for layer in self.decoder_layers:
            x = layer(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]


def masked_pixel_error(pixel_values, prediction, noise, visible, patch_size, normalize_pixels=True):
    """Mean squared error of a prediction [I, P, X] on the hidden patches, in fp32; normalised: each patch's pixels are
    first brought to mean 0 and deviation 1."""
    images, channels, height, width = pixel_values.shape
    grid = pixel_values.float().reshape(
        images, channels, height // patch_size, patch_size, width // patch_size, patch_size
    )
    target = grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    if normalize_pixels:
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    error = (prediction.float() - target).square().mean(dim=-1)
    return error.gather(1, shuffled_patches(noise)[:, visible:]).mean()
