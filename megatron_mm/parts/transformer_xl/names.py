"""Entries of the Transformer-XL tower: the nodes of nodes.py and the module of hf/transformer_xl.py."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mm.models.names import Entry, linear, norm, plain, query_key_value
from megatron_mm.parts.transformer_xl.section import TransformerXLConfig


def transformer_xl_entries(
    text: TransformerXLConfig, training_prefix: str = "text", hf_prefix: str = "model.text_tower"
) -> Iterator[Entry]:
    """Every parameter of the tower, in the order of its nodes; u and v once, for the layer that owns them."""
    size, heads, ffn = text.hidden_size, text.num_attention_heads, text.ffn_hidden_size
    embedding = f"{training_prefix}.embedding.word_embeddings.weight"
    yield plain(embedding, f"{hf_prefix}.embed_tokens.weight", text.vocab_size, size)
    for name in ("u", "v"):
        yield plain(f"{training_prefix}.layers.0.self_attention.{name}", f"{hf_prefix}.{name}", size)
    for i in range(text.num_layers):
        node, layer = f"{training_prefix}.layers.{i}", f"{hf_prefix}.layers.{i}"
        ours, attention = f"{node}.self_attention", f"{layer}.attention"
        qkv = (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj")
        yield from norm(f"{node}.input_layernorm", f"{layer}.layernorm_before", size, bias=True)
        yield from query_key_value(f"{ours}.linear_qkv", qkv, heads, size // heads, size, bias=False)
        yield from linear(f"{ours}.linear_pos", f"{attention}.r_proj", size, size, bias=False)
        yield from linear(f"{ours}.linear_proj", f"{attention}.o_proj", size, size, bias=False)
        yield from norm(f"{node}.pre_mlp_layernorm", f"{layer}.layernorm_after", size, bias=True)
        yield from linear(f"{node}.mlp.linear_fc1", f"{layer}.mlp.fc1", ffn, size)
        yield from linear(f"{node}.mlp.linear_fc2", f"{layer}.mlp.fc2", size, ffn)
    yield from norm(f"{training_prefix}.output.final_layernorm", f"{hf_prefix}.layernorm", size, bias=True)
