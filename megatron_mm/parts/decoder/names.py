"""Entries of text decoders (parts/decoder/nodes.py) and of layers that read a memory (layers/memory_attention.py).

The exported names of decoders are Llama's, so that a Llama goes into them as it is.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mm.models.names import Entry, Part, norm, plain, stacked
from megatron_mm.parts.decoder.section import DecoderConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def embedding_entry(decoder: DecoderConfig) -> Entry:
    """The token embedding."""
    return plain("decoder.embedding.word_embeddings.weight", EMBEDDING, decoder.vocab_size, decoder.hidden_size)


def output_entries(decoder: DecoderConfig) -> Iterator[Entry]:
    """Final norm and head."""
    yield from norm("decoder.output.final_layernorm", "model.norm", decoder.hidden_size, bias=False)
    yield plain("decoder.output.output_layer.weight", HEAD, decoder.vocab_size, decoder.hidden_size)


def decoder_layer_entries(decoder: DecoderConfig, index: int) -> Iterator[Entry]:
    """Self-attention and MLP of a layer."""
    size, ffn = decoder.hidden_size, decoder.ffn_hidden_size
    node, hf = f"decoder.layers.{index}", f"model.layers.{index}"
    heads, groups = decoder.num_attention_heads, decoder.num_query_groups
    yield from norm(f"{node}.input_layernorm", f"{hf}.input_layernorm", size, bias=False)
    yield from grouped_attention_entries(f"{node}.self_attention", f"{hf}.self_attn", size, heads, groups)
    yield from norm(f"{node}.pre_mlp_layernorm", f"{hf}.post_attention_layernorm", size, bias=False)
    yield from swiglu_entries(f"{node}.mlp", f"{hf}.mlp", size, ffn)


def grouped_attention_entries(training: str, hf: str, size: int, heads: int, groups: int) -> Iterator[Entry]:
    """Grouped-query self-attention without biases."""
    parts = (Part(f"{hf}.q_proj.weight", heads // groups), Part(f"{hf}.k_proj.weight"), Part(f"{hf}.v_proj.weight"))
    yield Entry(f"{training}.linear_qkv.weight", parts, groups, size // heads, (size,))
    yield plain(f"{training}.linear_proj.weight", f"{hf}.o_proj.weight", size, size)


def swiglu_entries(training: str, hf: str, size: int, ffn: int) -> Iterator[Entry]:
    """An MLP with a gate, without biases."""
    yield stacked(f"{training}.linear_fc1.weight", [f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight"], ffn, size)
    yield plain(f"{training}.linear_fc2.weight", f"{hf}.down_proj.weight", size, ffn)


def memory_attention_entries(
    training: str, hf: str, size: int, heads: int, groups: int, memory_size: int, qk_norm: bool = False
) -> Iterator[Entry]:
    """Attention to a memory, without biases."""
    head_dim = size // heads
    yield plain(f"{training}.linear_q.weight", f"{hf}.q_proj.weight", size, size)
    parts = (Part(f"{hf}.k_proj.weight"), Part(f"{hf}.v_proj.weight"))
    yield Entry(f"{training}.linear_kv.weight", parts, groups, head_dim, (memory_size,))
    if qk_norm:
        for kind in "qk":
            yield from norm(f"{training}.{kind}_layernorm", f"{hf}.{kind}_norm", head_dim, bias=False)
    yield plain(f"{training}.linear_proj.weight", f"{hf}.o_proj.weight", size, size)
