"""The Conformer tower in plain torch: waveforms of 16 kHz to one state every 20 ms.

`input_values` pass strided convolutions with LayerNorm and GELU, a projection, Conformer blocks with relative positions
(arXiv:2005.08100, arXiv:1901.02860) and a final LayerNorm. Parameters are named as in transformers' Wav2Vec2Conformer,
with Wav2Vec2-BERT's `depthwise_layer_norm` in place of BatchNorm, and matrices for convolutions of kernel 1. Part of
exported folders: it needs torch only, and serves as the reference that the training code is compared with.

Shapes: A sounds, L positions, P = 2L-1 distances, C width, N heads, d head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class ConformerConvLayer(nn.Module):
    def __init__(self, inputs, outputs, kernel, stride, eps):
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, stride=stride)
        self.layer_norm = nn.LayerNorm(outputs, eps=eps)

    def forward(self, x):
        """[A, C, L] -> [A, C', L']."""
        return F.gelu(self.layer_norm(self.conv(x).transpose(1, 2))).transpose(1, 2)


class ConformerFeatureExtractor(nn.Module):
    def __init__(self, channels, kernels, strides, eps):
        super().__init__()
        inputs = [1] + [channels] * (len(kernels) - 1)
        self.conv_layers = nn.ModuleList(
            ConformerConvLayer(width, channels, kernel, stride, eps)
            for width, kernel, stride in zip(inputs, kernels, strides)
        )

    def forward(self, input_values):
        """[A, samples] -> [A, L, C]."""
        x = input_values[:, None]
        for layer in self.conv_layers:
            x = layer(x)
        return x.transpose(1, 2)


class ConformerFeatureProjection(nn.Module):
    def __init__(self, channels, hidden_size, eps):
        super().__init__()
        self.layer_norm = nn.LayerNorm(channels, eps=eps)
        self.projection = nn.Linear(channels, hidden_size)

    def forward(self, x):
        return self.projection(self.layer_norm(x))


def relative_sinusoids(length, width, device, dtype):
    """[P, width]: encodings of the distances length-1 … -(length-1) of a key before its query."""
    distances = torch.arange(length - 1, -length, -1, dtype=torch.float32, device=device)
    steps = torch.arange(0, width, 2, dtype=torch.float32, device=device)
    angles = distances[:, None] * torch.exp(steps * (-math.log(10000.0) / width))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).to(dtype)


class ConformerSelfAttention(nn.Module):
    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.head_dim = hidden_size // num_heads
        self.linear_q = nn.Linear(hidden_size, hidden_size)
        self.linear_k = nn.Linear(hidden_size, hidden_size)
        self.linear_v = nn.Linear(hidden_size, hidden_size)
        self.linear_out = nn.Linear(hidden_size, hidden_size)
        self.linear_pos = nn.Linear(hidden_size, hidden_size, bias=False)
        self.pos_bias_u = nn.Parameter(torch.zeros(num_heads, self.head_dim))
        self.pos_bias_v = nn.Parameter(torch.zeros(num_heads, self.head_dim))

    def _heads(self, x):
        """[…, L, C] -> […, N, L, d]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(-2, -3)

    def forward(self, x, positions):
        q, k, v = (self._heads(linear(x)) for linear in (self.linear_q, self.linear_k, self.linear_v))
        p = self._heads(self.linear_pos(positions))
        length = x.shape[1]
        # A query at i is at column length-1-i+j of the distances from a key at j.
        index = torch.arange(length, device=x.device)
        columns = (length - 1 - index[:, None] + index).expand(*q.shape[:2], length, length)
        relative = ((q + self.pos_bias_v[:, None]) @ p.mT).gather(-1, columns)
        bias = relative * self.head_dim**-0.5
        attended = F.scaled_dot_product_attention(q + self.pos_bias_u[:, None], k, v, attn_mask=bias)
        return self.linear_out(attended.transpose(1, 2).flatten(2))


class ConformerFeedForward(nn.Module):
    def __init__(self, hidden_size, intermediate_size):
        super().__init__()
        self.intermediate_dense = nn.Linear(hidden_size, intermediate_size)
        self.output_dense = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x):
        return self.output_dense(F.silu(self.intermediate_dense(x)))


class ConformerConvolutionModule(nn.Module):
    def __init__(self, hidden_size, kernel_size, eps):
        super().__init__()
        self.layer_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.pointwise_conv1 = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.depthwise_conv = nn.Conv1d(
            hidden_size, hidden_size, kernel_size, padding=kernel_size // 2, groups=hidden_size, bias=False
        )
        self.depthwise_layer_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.pointwise_conv2 = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x):
        x = F.glu(self.pointwise_conv1(self.layer_norm(x)), dim=-1)
        x = self.depthwise_conv(x.transpose(1, 2)).transpose(1, 2)
        return self.pointwise_conv2(F.silu(self.depthwise_layer_norm(x)))


class ConformerLayer(nn.Module):
    def __init__(self, hidden_size, num_heads, intermediate_size, kernel_size, eps):
        super().__init__()
        self.ffn1_layer_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.ffn1 = ConformerFeedForward(hidden_size, intermediate_size)
        self.self_attn_layer_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.self_attn = ConformerSelfAttention(hidden_size, num_heads)
        self.conv_module = ConformerConvolutionModule(hidden_size, kernel_size, eps)
        self.ffn2_layer_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.ffn2 = ConformerFeedForward(hidden_size, intermediate_size)
        self.final_layer_norm = nn.LayerNorm(hidden_size, eps=eps)

    def forward(self, x, positions):
        x = x + 0.5 * self.ffn1(self.ffn1_layer_norm(x))
        x = x + self.self_attn(self.self_attn_layer_norm(x), positions)
        x = x + self.conv_module(x)
        x = x + 0.5 * self.ffn2(self.ffn2_layer_norm(x))
        return self.final_layer_norm(x)


class ConformerEncoder(nn.Module):
    def __init__(self, num_layers, hidden_size, num_heads, intermediate_size, kernel_size, eps):
        super().__init__()
        self.layers = nn.ModuleList(
            ConformerLayer(hidden_size, num_heads, intermediate_size, kernel_size, eps) for _ in range(num_layers)
        )
        self.layer_norm = nn.LayerNorm(hidden_size, eps=eps)

    def forward(self, x):
        positions = relative_sinusoids(x.shape[1], x.shape[2], x.device, x.dtype)
        for layer in self.layers:
            x = layer(x, positions)
        return self.layer_norm(x)


class ConformerModel(nn.Module):
    """The whole tower.

    Args:
        conv_depthwise_kernel_size: positions that the convolution modules see; odd.
        conv_dim: channels of the convolutions on the waveform.
        conv_kernel, conv_stride: their kernels and strides.
    """

    def __init__(
        self,
        *,
        num_hidden_layers,
        hidden_size,
        num_attention_heads,
        intermediate_size,
        conv_depthwise_kernel_size,
        conv_dim,
        conv_kernel,
        conv_stride,
        layer_norm_eps,
    ):
        super().__init__()
        self.feature_extractor = ConformerFeatureExtractor(conv_dim, conv_kernel, conv_stride, layer_norm_eps)
        self.feature_projection = ConformerFeatureProjection(conv_dim, hidden_size, layer_norm_eps)
        self.encoder = ConformerEncoder(
            num_hidden_layers,
            hidden_size,
            num_attention_heads,
            intermediate_size,
            conv_depthwise_kernel_size,
            layer_norm_eps,
        )

    def forward(self, input_values):
        """Waveforms of mean 0 and deviation 1 [A, samples] -> [A, L, C]."""
        features = self.feature_extractor(input_values.to(self.feature_projection.projection.weight.dtype))
        return self.encoder(self.feature_projection(features))
