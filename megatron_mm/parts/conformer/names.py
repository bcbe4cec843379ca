"""Parameters of the Conformer tower in training and in an exported folder (hf/conformer.py).

Only queries, keys and values are fused in training. The names on the exported side are Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mm.models.names import Entry, linear, norm, plain, query_key_value
from megatron_mm.parts.conformer.section import ConformerConfig


def conformer_entries(tower: ConformerConfig, training_prefix: str, hf_prefix: str) -> Iterator[Entry]:
    """Every parameter of the tower, in the order of its nodes.

    Args:
        training_prefix: of its nodes, e.g. "audio".
        hf_prefix: of its module, e.g. "model.audio_tower".
    """
    channels, size = tower.front_channels, tower.hidden_size
    front, extractor = f"{training_prefix}.front", f"{hf_prefix}.feature_extractor.conv_layers"
    for i, kernel in enumerate(tower.front_kernels):
        ours, theirs = f"{front}.convolutions.{i}", f"{extractor}.{i}"
        inputs = channels if i else 1
        yield plain(f"{ours}.convolution.weight", f"{theirs}.conv.weight", channels, inputs, kernel)
        yield plain(f"{ours}.convolution.bias", f"{theirs}.conv.bias", channels)
        yield from norm(f"{ours}.layernorm", f"{theirs}.layer_norm", channels, bias=True)
    projection = f"{hf_prefix}.feature_projection"
    yield from norm(f"{front}.projection_layernorm", f"{projection}.layer_norm", channels, bias=True)
    yield from linear(f"{front}.projection", f"{projection}.projection", size, channels)
    for i in range(tower.num_layers):
        yield from _layer(tower, f"{training_prefix}.layers.{i}", f"{hf_prefix}.encoder.layers.{i}")
    yield from norm(f"{training_prefix}.output.final_layernorm", f"{hf_prefix}.encoder.layer_norm", size, bias=True)


def _layer(tower: ConformerConfig, ours: str, theirs: str) -> Iterator[Entry]:
    size, heads = tower.hidden_size, tower.num_attention_heads
    width = size // heads
    yield from _feed_forward(tower, ours, theirs, "ffn1")
    yield from norm(f"{ours}.attention_layernorm", f"{theirs}.self_attn_layer_norm", size, bias=True)
    attention, hf = f"{ours}.self_attention", f"{theirs}.self_attn"
    names = (f"{hf}.linear_q", f"{hf}.linear_k", f"{hf}.linear_v")
    yield from query_key_value(f"{attention}.linear_qkv", names, heads, width, size)
    yield from linear(f"{attention}.linear_pos", f"{hf}.linear_pos", size, size, bias=False)
    for name in ("pos_bias_u", "pos_bias_v"):
        yield plain(f"{attention}.{name}", f"{hf}.{name}", heads, width)
    yield from linear(f"{attention}.linear_proj", f"{hf}.linear_out", size, size)
    convolution, hf = f"{ours}.convolution", f"{theirs}.conv_module"
    yield from norm(f"{ours}.convolution_layernorm", f"{hf}.layer_norm", size, bias=True)
    yield from linear(f"{convolution}.pointwise_conv1", f"{hf}.pointwise_conv1", 2 * size, size, bias=False)
    kernel = tower.conv_kernel_size
    yield plain(f"{convolution}.depthwise_conv.weight", f"{hf}.depthwise_conv.weight", size, 1, kernel)
    yield from norm(f"{convolution}.depthwise_layernorm", f"{hf}.depthwise_layer_norm", size, bias=True)
    yield from linear(f"{convolution}.pointwise_conv2", f"{hf}.pointwise_conv2", size, size, bias=False)
    yield from _feed_forward(tower, ours, theirs, "ffn2")
    yield from norm(f"{ours}.final_layernorm", f"{theirs}.final_layer_norm", size, bias=True)


def _feed_forward(tower: ConformerConfig, ours: str, theirs: str, name: str) -> Iterator[Entry]:
    size, ffn = tower.hidden_size, tower.ffn_hidden_size
    yield from norm(f"{ours}.{name}_layernorm", f"{theirs}.{name}_layer_norm", size, bias=True)
    yield from linear(f"{ours}.{name}.linear_fc1", f"{theirs}.{name}.intermediate_dense", ffn, size)
    yield from linear(f"{ours}.{name}.linear_fc2", f"{theirs}.{name}.output_dense", size, ffn)
