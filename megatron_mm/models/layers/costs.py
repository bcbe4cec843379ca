"""Closed forms of what the common nodes cost for one microbatch, summed over tensor- and context-parallel processes.

FLOPs are those of the matrix products that run: attention scores count in full, T × T, also where a causal mask hides
half of them (the convention of MFU and of torch's FlopCounterMode), and work that every process repeats counts on each.
Activation bytes are what the backward pass needs at two bytes a value, attention computed without stored scores
(Korthikanti et al., arXiv:2205.05198, with flash attention); what tensor parallelism does not shard is kept TP times.
"""

from __future__ import annotations

from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.models.graph import NodeCost
from megatron_mm.models.layers.settings import StackShape


def copies(sizes: ParallelSizes, *, sharded: bool) -> int:
    """How many processes keep a value that is not sharded over heads or columns.

    Text: TP without sequence parallelism. A tower, which is whole on every process: TP × CP.
    """
    if sharded:
        return 1 if sizes.sequence_parallel else sizes.tp
    return sizes.tp * sizes.cp


def layer_cost(shape: StackShape, sequences: int, length: int, sizes: ParallelSizes, *, sharded: bool) -> NodeCost:
    """A layer of self-attention and MLP on `sequences` × `length` positions."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    query, key_value = shape.num_attention_heads * shape.head_dim, 2 * shape.num_query_groups * shape.head_dim
    fc1 = ffn * (2 if shape.gated else 1)
    matrices = hidden * (query + key_value) + query * hidden + hidden * fc1 + ffn * hidden
    biases = query + key_value + hidden + fc1 + hidden if shape.bias else 0
    norms = 2 * hidden * (2 if shape.normalization == "LayerNorm" else 1)
    positions = sequences * length * (1 if sharded else sizes.cp)
    flops = 2.0 * positions * matrices + 4.0 * positions * length * query
    # Inputs of both norms and of the linears after them; then, sharded by TP: q k v, attention output with its
    # log-sum-exp (4 bytes a head), what the activation reads and, for SwiGLU, its product's factors; input of fc2.
    whole = 4 * hidden * (copies(sizes, sharded=sharded) // (1 if sharded else sizes.cp))
    divided = 2 * query + key_value + fc1 + (2 * ffn if shape.gated else ffn)
    stored = positions * (2.0 * (whole + divided) + 4.0 * shape.num_attention_heads)
    return NodeCost(matrices + biases + norms, flops, stored)


def cross_cost(
    shape: StackShape,
    sizes: ParallelSizes,
    *,
    rows: int,
    length: int,
    memories: tuple[tuple[int, int, int, int], ...],
    qk_layernorm: bool,
) -> NodeCost:
    """A gated cross-attention sublayer.

    Args:
        memories: (width, media of the microbatch, positions of a medium, slots of a row) of each memory.
    """
    hidden, query = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    key_value = 2 * shape.num_query_groups * shape.head_dim
    widths = sum(width for width, *_ in memories)
    parameters = hidden + 2 * hidden * query + widths * key_value + 1 + (2 * shape.head_dim if qk_layernorm else 0)
    positions = rows * length
    keys = sum(tokens * slots for _, _, tokens, slots in memories)
    flops = 2.0 * positions * 2 * hidden * query + 4.0 * positions * keys * query
    # Input of the norm and of q, output before the gate; q before and after its norm, attention output; gathered k v.
    values = float(
        positions * (3 * hidden * copies(sizes, sharded=True) + 3 * query) + sizes.cp * rows * keys * key_value
    )
    for width, media, tokens, _ in memories:
        # Every context-parallel process projects all media. The memory itself is kept by the node that wrote it.
        flops += 2.0 * sizes.cp * media * tokens * width * key_value
        values += sizes.cp * media * tokens * key_value
    # The mask (one value a position and key) is kept once per chunk, not once per sublayer: it is not counted here.
    return NodeCost(parameters, flops, 2.0 * values + 4.0 * positions * shape.num_attention_heads)


def embedding_cost(shape: StackShape, vocab_size: int, positions: int, sizes: ParallelSizes) -> NodeCost:
    """Token embedding: a look-up, no products; its input is one index of eight bytes a position."""
    return NodeCost(vocab_size * shape.hidden_size, 0.0, 8.0 * positions * sizes.tp)


def head_cost(
    shape: StackShape,
    vocab_size: int,
    positions: int,
    sizes: ParallelSizes,
    *,
    sharded: bool = True,
    output_width: int | None = None,
    tied: bool = False,
) -> NodeCost:
    """Final norm, output projection and softmax of the loss, whose fp32 values are kept.

    Args:
        output_width: width of the vocabulary's vectors, where states are projected to it first.
        tied: the vocabulary's vectors belong to another node.
    """
    hidden, width = shape.hidden_size, output_width or shape.hidden_size
    norm = hidden * (2 if shape.normalization == "LayerNorm" else 1)
    projection = hidden * width if output_width else 0
    times = 1 if sharded else sizes.cp
    flops = 2.0 * positions * times * (width * vocab_size + projection * sizes.tp)
    whole = hidden + width + (hidden if output_width else 0)
    stored = positions * (2.0 * whole * copies(sizes, sharded=sharded) + 4.0 * vocab_size * times)
    return NodeCost(norm + projection + (0 if tied else vocab_size * width), flops, stored)


def pooled_head_cost(
    width: int, outputs: int, rows: int, sizes: ParallelSizes, *, norm: StackShape | None = None
) -> NodeCost:
    """A projection of one vector a row, whole on every process, behind a norm of that stack's kind."""
    everywhere = rows * sizes.tp * sizes.cp
    weights = 0 if norm is None else width * (2 if norm.normalization == "LayerNorm" else 1)
    stored = 4.0 * everywhere * (width + outputs)
    return NodeCost(width * outputs + weights, 2.0 * everywhere * width * outputs, stored)
