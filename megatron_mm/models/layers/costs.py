"""What the common nodes cost for one microbatch: parameters, records of one process's work, bytes that are kept.

FLOPs are those of the matrix products that run: attention scores count in full, T × T, also where a causal mask hides
half of them (the convention of MFU and of torch's FlopCounterMode), and work that every process repeats counts on each.
Activation bytes are summed over tensor- and context-parallel processes: what the backward pass needs at two bytes a
value, attention computed without stored scores (Korthikanti et al., arXiv:2205.05198, with flash attention); what
tensor parallelism does not shard is kept TP times.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.models.graph import NodeCost
from megatron_mm.models.layers.settings import LayerSettings, StackShape
from megatron_mm.models.work import Attention, Collective, MatrixProduct, Moved, Work, share


def copies(sizes: ParallelSizes, *, sharded: bool) -> int:
    """How many processes keep a value that is not sharded over heads or columns.

    Text: TP without sequence parallelism. A tower, which is whole on every process: TP × CP.
    """
    if sharded:
        return 1 if sizes.sequence_parallel else sizes.tp
    return sizes.tp * sizes.cp


@dataclass(frozen=True)
class StackWork:
    """Makes the records of layers of one stack, for one process.

    Attributes:
        sharded: positions are divided over context parallelism and, outside products, sequence parallelism.
    """

    settings: LayerSettings
    sharded: bool = False

    @property
    def sequence_parallel(self) -> bool:
        """Positions are divided over tensor parallelism outside products."""
        return self.sharded and self.settings.sizes.sequence_parallel and self.settings.sizes.tp > 1

    def local(self, length: int) -> int:
        """Positions of a sequence that a context-parallel process has."""
        return share(length, self.settings.sizes.cp, "positions of a sequence") if self.sharded else length

    def split(self, columns: int, what: str) -> int:
        """Columns, heads or channels of one tensor-parallel process."""
        return share(columns, self.settings.sizes.tp, what)

    def bytes(self, values: int) -> int:
        """In the precision of the layers."""
        return values * self.settings.dtype.itemsize

    def moved(self, values: int, what: str, count: int = 1) -> Moved:
        """Kernels that each read and write `values` values in all."""
        return Moved(self.bytes(values), count, what)

    def outside(self, positions: int, width: int, times: int, what: str, count: int = 1) -> Moved:
        """Kernels on whole states [positions, width], which they read and write `times` times in all."""
        tp = self.settings.sizes.tp if self.sequence_parallel else 1
        return self.moved(times * share(positions, tp, "positions of a process") * width, what, count)

    def norm(self, positions: int, width: int) -> Moved:
        """Reads states and writes them."""
        return self.outside(positions, width, 2, "norm")

    def collective(self, kind: str, values: int, runs: str, what: str, count: int = 1) -> tuple[Collective, ...]:
        """Over tensor parallelism, if there is any."""
        if self.settings.sizes.tp == 1:
            return ()
        return (Collective(kind, "tp", self.bytes(values), count, runs, what),)

    def column(self, positions: int, inputs: int, outputs: int, what: str) -> tuple[Work, ...]:
        """A linear layer whose output is divided over tensor parallelism (megatron-core's ColumnParallelLinear).

        The input's gradient is summed over the processes. With sequence parallelism the input is gathered for the
        product, and again for the weight's gradient, and its gradient is scattered.
        """
        product = MatrixProduct(positions, self.split(outputs, what), inputs, what=what)
        values = positions * inputs
        if not self.sequence_parallel:
            return (product, *self.collective("all_reduce", values, "dgrad", what))
        return (
            product,
            *self.collective("all_gather", values, "forward", what),
            *self.collective("all_gather", values, "wgrad", what),
            *self.collective("reduce_scatter", values, "dgrad", what),
        )

    def row(self, positions: int, inputs: int, outputs: int, what: str) -> tuple[Work, ...]:
        """A linear layer whose input is divided (RowParallelLinear): its output is summed, or summed and scattered."""
        return (MatrixProduct(positions, outputs, self.split(inputs, what), what=what),
                *self.summed(positions, outputs, what))  # fmt: skip

    def summed(self, positions: int, width: int, what: str) -> tuple[Collective, ...]:
        """Partial results of the processes are summed; with sequence parallelism each keeps its positions."""
        values = positions * width
        if not self.sequence_parallel:
            return self.collective("all_reduce", values, "forward", what)
        return (
            *self.collective("reduce_scatter", values, "forward", what),
            *self.collective("all_gather", values, "dgrad", what),
        )

    def summed_gradient(self, weights: int, what: str) -> tuple[Collective, ...]:
        """Of weights that each process applies to its own heads (sharding.sum_gradient_over_tp)."""
        return self.collective("all_reduce", weights, "wgrad", what)

    def attention(
        self,
        sequences: int,
        length: int,
        keys: int,
        shape: StackShape,
        what: str,
        *,
        groups: int | None = None,
        causal: bool = False,
    ) -> Attention:
        """Of the queries of sequences of `length` positions to `keys` keys, without exchange of heads.

        Args:
            groups: key-value heads; None: those of the shape.
        """
        groups = groups or shape.num_query_groups
        heads, groups = self.split(shape.num_attention_heads, "heads"), self.split(groups, "key-value heads")
        return Attention(sequences, self.local(length), keys, heads, groups, shape.head_dim, causal, what=what)

    def self_attention(
        self, sequences: int, length: int, shape: StackShape, *, causal: bool, one_document: bool
    ) -> tuple[Work, ...]:
        """Attention of sequences to themselves, with what context parallelism exchanges for it (layers/attention.py).

        Args:
            one_document: a row is one document, so that Transformer Engine exchanges by itself if it is causal too.
        """
        what, settings = "self-attention", self.settings
        cp = settings.sizes.cp if self.sharded else 1
        attention = self.attention(sequences, length, length, shape, what, causal=causal)
        if cp == 1:
            return (attention,)
        heads, groups, local = attention.heads, attention.key_value_heads, self.local(length)
        positions = sequences * local
        keys_values = 2 * positions * groups * shape.head_dim
        if settings.cp_comm_type == "a2a":
            of_heads = (share(heads, cp, "heads of a process"), share(groups, cp, "key-value heads of a process"))
            attention = Attention(sequences, length, length, *of_heads, shape.head_dim, causal, what=what)
            given, taken = keys_values + positions * heads * shape.head_dim, positions * heads * shape.head_dim
            exchanged = [("all_to_all", given, "forward"), ("all_to_all", taken, "forward"),
                         ("all_to_all", taken, "dgrad"), ("all_to_all", given, "dgrad")]  # fmt: skip
            times = 1
        elif settings.cp_comm_type == "p2p" and settings.backend == "transformer_engine" and causal and one_document:
            # Keys and values pass on cp - 1 times; in the backward pass their gradients go with them.
            exchanged = [("send_receive", keys_values, "forward"), ("send_receive", 2 * keys_values, "dgrad")]
            times = cp - 1
        else:
            exchanged = [("all_gather", cp * keys_values, "forward"), ("reduce_scatter", cp * keys_values, "dgrad")]
            times = 1
        return (
            attention,
            *(Collective(kind, "cp", self.bytes(values), times, runs, what) for kind, values, runs in exchanged),
        )


def self_attention_cost(
    shape: StackShape,
    sequences: int,
    length: int,
    settings: LayerSettings,
    *,
    sharded: bool,
    causal: bool = False,
    one_document: bool = True,
) -> NodeCost:
    """Norm, self-attention and residual of a layer on `sequences` × `length` positions."""
    sizes, hidden, query = settings.sizes, shape.hidden_size, shape.num_attention_heads * shape.head_dim
    key_value = 2 * shape.num_query_groups * shape.head_dim
    matrices = hidden * (query + key_value) + query * hidden
    biases = query + key_value + hidden if shape.bias else 0
    norm = hidden * (2 if shape.normalization == "LayerNorm" else 1)
    make = StackWork(settings, sharded)
    local = sequences * make.local(length)
    work = (
        make.norm(local, hidden),
        *make.column(local, hidden, query + key_value, "queries, keys, values"),
        make.moved(2 * local * make.split(query + key_value, "heads"), "queries, keys, values"),
        *make.self_attention(sequences, length, shape, causal=causal, one_document=one_document),
        *make.row(local, query, hidden, "attention output"),
        make.outside(local, hidden, 3, "residual"),
    )
    # Inputs of the norm and of the linear layer after it; then, sharded by TP: q k v, attention output with its
    # log-sum-exp (4 bytes a head).
    positions = sequences * length * (1 if sharded else sizes.cp)
    kept = copies(sizes, sharded=sharded) // (1 if sharded else sizes.cp)
    stored = positions * (2.0 * (2 * hidden * kept + 2 * query + key_value) + 4.0 * shape.num_attention_heads)
    return NodeCost(matrices + biases + norm, work, stored, sizes.tp_cp)


def mlp_cost(shape: StackShape, sequences: int, length: int, settings: LayerSettings, *, sharded: bool) -> NodeCost:
    """Norm, MLP and residual of a layer on `sequences` × `length` positions."""
    sizes, hidden, ffn = settings.sizes, shape.hidden_size, shape.ffn_hidden_size
    fc1 = ffn * (2 if shape.gated else 1)
    biases = fc1 + hidden if shape.bias else 0
    norm = hidden * (2 if shape.normalization == "LayerNorm" else 1)
    make = StackWork(settings, sharded)
    local = sequences * make.local(length)
    work = (
        make.norm(local, hidden),
        *make.column(local, hidden, fc1, "fc1"),
        make.moved(local * make.split(fc1 + ffn, "inner width"), "activation"),
        *make.row(local, ffn, hidden, "fc2"),
        make.outside(local, hidden, 3, "residual"),
    )
    # Inputs of the norm and of fc1; then, sharded by TP, what the activation reads and, for SwiGLU, its product's
    # factors; input of fc2.
    positions = sequences * length * (1 if sharded else sizes.cp)
    kept = copies(sizes, sharded=sharded) // (1 if sharded else sizes.cp)
    stored = 2.0 * positions * (2 * hidden * kept + fc1 + (2 * ffn if shape.gated else ffn))
    return NodeCost(hidden * fc1 + ffn * hidden + biases + norm, work, stored, sizes.tp_cp)


def layer_cost(
    shape: StackShape, sequences: int, length: int, settings: LayerSettings, *, sharded: bool, **seen: bool
) -> NodeCost:
    """A layer of self-attention and MLP on `sequences` × `length` positions; `seen` as of self_attention_cost."""
    attention = self_attention_cost(shape, sequences, length, settings, sharded=sharded, **seen)
    return attention + mlp_cost(shape, sequences, length, settings, sharded=sharded)


def cross_cost(
    shape: StackShape,
    settings: LayerSettings,
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
    sizes, hidden, query = settings.sizes, shape.hidden_size, shape.num_attention_heads * shape.head_dim
    key_value = 2 * shape.num_query_groups * shape.head_dim
    widths = sum(width for width, *_ in memories)
    parameters = hidden + 2 * hidden * query + widths * key_value + 1 + (2 * shape.head_dim if qk_layernorm else 0)
    positions = rows * length
    keys = sum(tokens * slots for _, _, tokens, slots in memories)
    make, whole = StackWork(settings, sharded=True), StackWork(settings)
    local, own = rows * make.local(length), make.split(key_value, "key-value heads")
    work = [make.norm(local, hidden), *make.column(local, hidden, query, "queries")]
    for width, media, tokens, _ in memories:  # every context-parallel process projects all media
        work += whole.column(media * tokens, width, key_value, "keys, values of media")
    if qk_layernorm:
        work.append(make.moved(2 * local * make.split(query, "heads"), "norm"))
        work += [make.moved(media * tokens * own, "norm") for _, media, tokens, _ in memories]  # of keys alone
        work += make.summed_gradient(shape.head_dim, "norm") * 2
    work += [
        make.moved(2 * rows * keys * own, "media of the slots"),
        make.attention(rows, length, keys, shape, "cross-attention"),
        *make.row(local, query, hidden, "attention output"),
        make.outside(local, hidden, 3, "gate and residual"),
    ]
    # Input of the norm and of q, output before the gate; q before and after its norm, attention output; gathered k v.
    values = float(
        positions * (3 * hidden * copies(sizes, sharded=True) + 3 * query) + sizes.cp * rows * keys * key_value
    )
    for _, media, tokens, _ in memories:  # the memory itself is kept by the node that wrote it
        values += sizes.cp * media * tokens * key_value
    # The mask (one value a position and key) is kept once per chunk, not once per sublayer: it is not counted here.
    stored = 2.0 * values + 4.0 * positions * shape.num_attention_heads
    return NodeCost(parameters, tuple(work), stored, sizes.tp_cp)


def look_up(make: StackWork, positions: int, width: int) -> tuple[Work, ...]:
    """A vocabulary-parallel embedding of a process's positions: rows of the table are read and written, and summed."""
    return (make.moved(2 * positions * width, "embedding"), *make.summed(positions, width, "embedding"))


def embedding_cost(
    shape: StackShape, vocab_size: int, rows: int, length: int, settings: LayerSettings
) -> NodeCost:
    """Token embedding: a look-up, no products; its input is one index of eight bytes a position."""
    make, sizes = StackWork(settings, sharded=True), settings.sizes
    work = look_up(make, rows * make.local(length), shape.hidden_size)
    return NodeCost(vocab_size * shape.hidden_size, work, 8.0 * rows * length * sizes.tp, sizes.tp_cp)


def head_cost(
    shape: StackShape,
    vocab_size: int,
    rows: int,
    length: int,
    settings: LayerSettings,
    *,
    sharded: bool = True,
    output_width: int | None = None,
    tied: bool = False,
) -> NodeCost:
    """Final norm and output projection, with what the softmax of the loss keeps in fp32; its work is the loss's.

    Args:
        output_width: width of the vocabulary's vectors, where states are projected to it first.
        tied: the vocabulary's vectors belong to another node.
    """
    sizes, hidden, width = settings.sizes, shape.hidden_size, output_width or shape.hidden_size
    norm = hidden * (2 if shape.normalization == "LayerNorm" else 1)
    projection = hidden * width if output_width else 0
    positions, make = rows * length, StackWork(settings, sharded)
    local = rows * make.local(length)
    work = (
        make.norm(local, hidden),
        *((MatrixProduct(local, width, hidden, what="projection"),) if output_width else ()),
        *make.column(local, width, vocab_size, "vocabulary"),
    )
    whole = hidden + width + (hidden if output_width else 0)
    times = 1 if sharded else sizes.cp
    stored = positions * (2.0 * whole * copies(sizes, sharded=sharded) + 4.0 * vocab_size * times)
    return NodeCost(norm + projection + (0 if tied else vocab_size * width), work, stored, sizes.tp_cp)


def pooled_head_cost(
    width: int,
    outputs: int,
    rows: int,
    settings: LayerSettings,
    *,
    norm: StackShape | None = None,
    sharded: bool = False,
) -> NodeCost:
    """A projection of one vector a row, whole on every process, behind a norm of that stack's kind.

    Args:
        sharded: vectors are pooled from a shard of the text, so that processes sum theirs.
    """
    sizes, make = settings.sizes, StackWork(settings)
    weights = 0 if norm is None else width * (2 if norm.normalization == "LayerNorm" else 1)
    work: list[Work] = [MatrixProduct(rows, outputs, width, what="pooled projection")]
    if norm is not None:
        work.append(make.norm(rows, width))
    if sharded and sizes.sequence_parallel:
        work += make.collective("all_reduce", rows * width, "forward", "pooled state")
    if sharded and sizes.cp > 1:
        runs = ("forward", "dgrad")
        work += [Collective("all_reduce", "cp", make.bytes(rows * width), 1, of, "pooled state") for of in runs]
    stored = 4.0 * rows * sizes.tp * sizes.cp * (width + outputs)
    return NodeCost(width * outputs + weights, tuple(work), stored, sizes.tp_cp)
