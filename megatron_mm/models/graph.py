"""A system is an ordered list of nodes over named streams; everything else about its pipeline follows from the list.

A node reads streams, writes streams and builds one module. Nodes run in order; a stream may be rewritten (each decoder
layer reads and writes `text`). Losses end the graph. From this the partitioner knows costs, a pipeline cut knows which
streams cross it (`Graph.live`), the loader knows which fields a chunk reads, and gradients are known to stop at frozen
nodes (`Graph.carries_gradient`). Nothing here knows about processes or about any system.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import nn

from megatron_mm.config.inputs import InputFormat
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.declared import DeclaredBatch
from megatron_mm.models.names import Entry, plain_name
from megatron_mm.models.work import Work


@dataclass(frozen=True)
class Stream:
    """A named tensor that flows between nodes.

    Attributes:
        shape: full shape for a microbatch plan; dimension 0 is the one that is sharded, if any is.
        layout: `sequence` is sharded on dimension 0 over context parallel, and over tensor parallel under sequence
            parallelism; `replicated` is whole on every process.
        dtype: None for the precision of the layers; torch.float32 where rounding would change the result.
    """

    name: str
    shape: Callable[[MicrobatchPlan], tuple[int, ...]]
    layout: Literal["sequence", "replicated"] = "replicated"
    dtype: torch.dtype | None = None

    def local_shape(self, plan: MicrobatchPlan, sizes: ParallelSizes) -> tuple[int, ...]:
        """Shape on one process.

        Raises:
            ValueError: the sharded dimension does not divide.
        """
        shape = self.shape(plan)
        if self.layout == "replicated":
            return shape
        parts = sizes.cp * (sizes.tp if sizes.sequence_parallel else 1)
        if shape[0] % parts:
            raise ValueError(f"stream {self.name}: {shape[0]} positions do not divide over {parts} processes")
        return (shape[0] // parts, *shape[1:])


@dataclass(frozen=True)
class NodeCost:
    """What one application of a node costs for one microbatch.

    Attributes:
        parameters: of the whole node.
        work: records of one process's forward pass; or a plain number, the floating-point operations of all processes
            together, where a kind says no more: the pipeline is cut by it, and no time can be planned of it.
        activation_bytes: kept for the backward pass at two bytes a value, without recomputation, over all tensor- and
            context-parallel processes.
        processes: tensor- and context-parallel processes, each of which does `work`.
    """

    parameters: int
    work: tuple[Work, ...] | float = ()
    activation_bytes: float = 0.0
    processes: int = 1

    @property
    def records(self) -> tuple[Work, ...] | None:
        """The work of one process; None where a plain number stands for it."""
        return self.work if isinstance(self.work, tuple) else None

    @property
    def forward_flops(self) -> float:
        """Floating-point operations of the forward pass over all these processes (a multiply-add is two)."""
        if isinstance(self.work, tuple):
            return float(self.processes * sum(record.flops for record in self.work))
        return float(self.work)

    def __add__(self, other: NodeCost) -> NodeCost:
        """Of two parts of one node. A part that does no work goes with any.

        Raises:
            ValueError: only one has records, or they are of other numbers of processes.
        """
        for idle, working in ((self, other), (other, self)):
            if idle.work == ():
                kept = idle.activation_bytes + working.activation_bytes
                return replace(working, parameters=idle.parameters + working.parameters, activation_bytes=kept)
        if isinstance(self.work, tuple) != isinstance(other.work, tuple) or self.processes != other.processes:
            raise ValueError(
                f"costs of two parts of a node count work alike, both in records or both in a number, of equally many "
                f"processes ({self.processes} and {other.processes} here)"
            )
        return NodeCost(
            self.parameters + other.parameters,
            self.work + other.work,
            self.activation_bytes + other.activation_bytes,
            self.processes,
        )


class ForwardContext:
    """What the nodes of a chunk share while one microbatch passes: the batch, and values derived from it once.

    Nothing of a microbatch is module state, because recomputation of one microbatch follows the forward of a later one.
    """

    def __init__(self, batch: Microbatch) -> None:
        self._whole = batch
        self._reader: tuple[str, frozenset[str] | None] = ("", None)
        self.batch: Microbatch | DeclaredBatch = batch
        self._derived: dict[tuple, tuple[Any, frozenset[str]]] = {}

    def reading(self, reader: str, fields: frozenset[str]) -> ForwardContext:
        """The same context for one reader, whose batch answers for the fields that it declares alone.

        Args:
            reader: who reads, for messages: "node 'text.embedding'".
        """
        context = ForwardContext(self._whole)
        context._reader, context._derived = (reader, fields), self._derived
        context.batch = DeclaredBatch(self._whole, reader, fields)
        return context

    def derived(self, make: Callable[..., Any], *arguments: Hashable) -> Any:
        """`make(batch, *arguments)`, computed at the first call with this function and these arguments.

        A function made anew at each call would be computed anew: `make` is one that all layers share.

        Raises:
            ValueError: it needs a field that this reader does not declare, whoever computed it first.
        """
        key = (make, *arguments)
        if key not in self._derived:
            seen = DeclaredBatch(self._whole, *self._reader)
            value = make(seen, *arguments)
            self._derived[key] = value, frozenset(seen.fields_read)
        value, read = self._derived[key]
        DeclaredBatch(self._whole, *self._reader).refuse_undeclared(read)
        return value


class LayerKind(Protocol):
    """A kind of module that a node holds: how it is built, what it costs, what its weights are called elsewhere.

    Training, planning and conversion read the same object, so that what is trained is what is planned and exported.
    """

    def build(self) -> nn.Module:
        """The module, its weights not yet filled, on the platform's current device."""

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """What a microbatch of this plan costs."""

    def names(self, node: str, exported: str) -> Iterable[Entry]:
        """Each training tensor of a node of this kind, and the exported tensors that it is made of.

        Args:
            node: the node's name, prefix of the training names.
            exported: prefix of the exported names.
        """


@dataclass(frozen=True)
class Kind:
    """A kind made of functions; without `names` it has nothing to export."""

    build: Callable[[], nn.Module]
    cost: Callable[[MicrobatchPlan], NodeCost]
    names: Callable[[str, str], Iterable[Entry]] = lambda node, exported: ()


@dataclass(frozen=True)
class Node:
    """One piece of the model that is never cut.

    Attributes:
        name: prefix of the parameter names and checkpoint keys, the same in every layout.
        kind: makes the module. It is called as `module(*streams_read, context)`, with the streams in the order of
            `reads` and a ForwardContext, and returns one tensor, or a tuple in the order of `writes`.
        reads: names of streams.
        writes: streams.
        exported: prefix of its weights' names in the exported model.
        fields: fields of Microbatch that the module reads beyond those that every stage has.
        trainable: False freezes it: no gradients, evaluation mode, outside DDP and optimizer.
        recomputable: a layer that full recomputation runs again in the backward pass.
        ties: parameters of this node (names within its module) that are the same weight as another node's, by its
            checkpoint key: initialised alike, gradients summed, counted and saved once. `cost` leaves them out.
    """

    name: str
    kind: LayerKind
    reads: tuple[str, ...]
    writes: tuple[Stream, ...]
    exported: str = ""
    fields: frozenset[str] = frozenset()
    trainable: bool = True
    recomputable: bool = False
    ties: Mapping[str, str] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The module, its weights not yet filled."""
        return self.kind.build()

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """What a microbatch of this plan costs."""
        return self.kind.cost(plan)

    @property
    def reader(self) -> str:
        """What it is called where it reads a microbatch."""
        return f"node {self.name!r}"

    def names(self) -> list[Entry]:
        """Its training tensors and the exported tensors that they are made of; tied ones are their owner's."""
        tied = {f"{self.name}.{name}" for name in self.ties}
        return [entry for entry in self.kind.names(self.name, self.exported) if entry.training not in tied]

    def check(self, module: nn.Module, plan: MicrobatchPlan, tp: int) -> None:
        """Compares the kind's word with the module that it built: plans and exports go by it.

        Args:
            tp: tensor-parallel processes among which the sharded weights are divided.

        Raises:
            ValueError: the cost counts other parameters, or the names are of other weights.
        """
        own = {name: weight for name, weight in module.named_parameters() if name not in self.ties}
        found = sum(w.numel() * (tp if getattr(w, "tensor_model_parallel", False) else 1) for w in own.values())
        said = self.cost(plan).parameters
        if said != found:
            raise ValueError(f"node {self.name!r}: its cost says {said:,} parameters, its module has {found:,}")
        names = {plain_name(f"{self.name}.{name}") for name in own}  # Transformer Engine fuses norms into linear layers
        theirs = {entry.training for entry in self.names()}
        if theirs and theirs != names:
            differ = ", ".join(sorted(names ^ theirs)[:4])
            raise ValueError(f"node {self.name!r}: its names are not those of its module's weights: {differ}")


def names_of(nodes: Iterable[Node]) -> list[Entry]:
    """Each training tensor of these nodes, and the exported tensors that it is made of, in their order."""
    return [entry for node in nodes for entry in node.names()]


@dataclass(frozen=True)
class Loss:
    """A term of the objective, computed on the last stage.

    Attributes:
        compute: `compute(*streams_read, context)` returns the *sum* of the term over this process's share of the
            microbatch, as a scalar; it is divided by the count of the whole global batch elsewhere.
        count: number of things (tokens, pairs, patches) of a microbatch on one process's rows, as a float tensor; every
            stage counts, so it reads fields that every stage has.
        sharded: each context-parallel process returns its part of the sum (True) or all of it (False).
        tasks: tasks of microbatches (MicrobatchPlan.task) that learn this term; None: all.
        whole_batch: the term compares samples of the whole global batch: `compute` is called once a step, with each
            stream as the list of its values in all microbatches (see pipeline/whole_batch.py).
        measure: makes of this loss what measures it on held-out rows (objectives/measures.py); None: its mean.
        work: records of its forward pass on one process, from the full shapes of the streams that it reads (those of
            all microbatches of a step as one, where it is of the whole batch) and the layout; None: it states none.
    """

    name: str
    compute: Callable[..., torch.Tensor]
    count: Callable[[Microbatch], torch.Tensor]
    reads: tuple[str, ...]
    weight: float = 1.0
    sharded: bool = True
    fields: frozenset[str] = frozenset()
    tasks: frozenset[str] | None = None
    whole_batch: bool = False
    measure: Callable[[Loss], Any] | None = None
    work: Callable[[Sequence[tuple[int, ...]], ParallelSizes], Iterable[Work]] | None = None

    @property
    def reader(self) -> str:
        """What it is called where it reads a microbatch."""
        return f"loss {self.name!r}"

    def counted(self, batch: Microbatch) -> float:
        """`count` of a microbatch, on whichever stage.

        Raises:
            ValueError: it reads a field that not every stage has.
        """
        return float(self.count(DeclaredBatch(batch, f"the count of loss {self.name!r}", frozenset())))

    def applies(self, plan: MicrobatchPlan) -> bool:
        """Whether a microbatch learns this term."""
        return self.tasks is None or plan.task in self.tasks


@dataclass(frozen=True)
class Graph:
    """The nodes and losses of a system, checked.

    Raises:
        ValueError: a repeated name, a stream that is read before anything writes it, or a tie that leads nowhere.
    """

    nodes: Sequence[Node]
    losses: Sequence[Loss]
    streams: dict[str, Stream] = field(init=False)
    carries_gradient: dict[tuple[int, str], bool] = field(init=False)
    """(position, stream): whether the stream, as it is before node `position`, depends on a trainable parameter."""
    ties: dict[str, list[tuple[int, str]]] = field(init=False)
    """Tied weights: (position of the node, name within its module) of each copy by checkpoint key, the owner first."""

    def __post_init__(self) -> None:
        streams: dict[str, Stream] = {}
        gradient: dict[tuple[int, str], bool] = {}
        current: dict[str, bool] = {}
        names: set[str] = set()
        for position, node in enumerate(self.nodes):
            if node.name in names:
                raise ValueError(f"two nodes are named {node.name!r}")
            names.add(node.name)
            gradient.update({(position, name): value for name, value in current.items()})
            for name in node.reads:
                if name not in streams:
                    raise ValueError(f"node {node.name!r} reads stream {name!r}, which no earlier node writes")
            learns = node.trainable or any(current[name] for name in node.reads)
            for stream in node.writes:
                known = streams.setdefault(stream.name, stream)
                if (known.layout, known.dtype) != (stream.layout, stream.dtype):
                    raise ValueError(f"node {node.name!r} writes stream {stream.name!r} in another layout or dtype")
                current[stream.name] = learns
        gradient.update({(len(self.nodes), name): value for name, value in current.items()})
        for loss in self.losses:
            for name in loss.reads:
                if name not in streams:
                    raise ValueError(f"loss {loss.name!r} reads stream {name!r}, which no node writes")
        object.__setattr__(self, "streams", streams)
        object.__setattr__(self, "carries_gradient", gradient)
        object.__setattr__(self, "ties", self._tie_groups())

    def _tie_groups(self) -> dict[str, list[tuple[int, str]]]:
        groups: dict[str, list[tuple[int, str]]] = {}
        for position, node in enumerate(self.nodes):
            for parameter, key in node.ties.items():
                found = [at for at, other in enumerate(self.nodes) if key.startswith(f"{other.name}.")]
                owner = max(found, key=lambda at: len(self.nodes[at].name), default=position)
                if owner == position:
                    raise ValueError(f"node {node.name!r} ties {parameter!r} to {key!r}, which names no other node")
                name = key[len(self.nodes[owner].name) + 1 :]
                if name in self.nodes[owner].ties:
                    raise ValueError(
                        f"node {node.name!r} ties {parameter!r} to {key!r}, which is tied itself: name the owner"
                    )
                if node.trainable != self.nodes[owner].trainable:
                    raise ValueError(
                        f"nodes {node.name!r} and {self.nodes[owner].name!r} share {key!r}, so both learn or neither"
                    )
                groups.setdefault(key, [(owner, name)]).append((position, parameter))
        return groups

    def leading_to(self, losses: Sequence[Loss]) -> Graph:
        """The part of the graph that some losses need: the other nodes stand where they stood, but do nothing."""
        needed = set(self.needed(name for loss in losses for name in loss.reads))
        idle = (node if at in needed else replace(node, reads=(), writes=()) for at, node in enumerate(self.nodes))
        return Graph(list(idle), losses)

    def needed(self, names: Iterable[str]) -> list[int]:
        """Positions of the nodes that must run for these streams, in order.

        Raises:
            ValueError: there is no such stream.
        """
        wanted = set(names)
        if unknown := wanted - self.streams.keys():
            raise ValueError(f"no stream {', '.join(sorted(unknown))}; there are {', '.join(self.streams)}")
        positions = []
        for position in reversed(range(len(self.nodes))):
            node = self.nodes[position]
            written = {stream.name for stream in node.writes}
            if written & wanted:
                positions.append(position)
                wanted = (wanted - written) | set(node.reads)
        return positions[::-1]

    def live(self, position: int) -> list[Stream]:
        """Streams that cross a cut just before node `position`: written earlier, read there or later, in name order."""
        written = {stream.name: stream for node in self.nodes[:position] for stream in node.writes}
        wanted: set[str] = {name for loss in self.losses for name in loss.reads}
        for node in reversed(self.nodes[position:]):
            wanted -= {stream.name for stream in node.writes}
            wanted |= set(node.reads)
        return [written[name] for name in sorted(written.keys() & wanted)]

    def check_fields(self, inputs: InputFormat) -> None:
        """Compares what nodes and losses declare to read with what samples have.

        Raises:
            ValueError: a field that samples of this format do not have.
        """
        known = inputs.fields | inputs.always_read
        for reader in (*self.nodes, *self.losses):
            if unknown := reader.fields - known:
                raise ValueError(
                    f"{reader.reader} declares {', '.join(sorted(unknown))}, which samples of this system do not have "
                    f"(`inputs` of its section); they have {', '.join(sorted(inputs.fields))}"
                )

    def fields(self, start: int, stop: int) -> frozenset[str]:
        """Microbatch fields that nodes start … stop-1 read, with the losses' if they end the graph."""
        read = [node.fields for node in self.nodes[start:stop]]
        if stop == len(self.nodes):
            read += [loss.fields for loss in self.losses]
        return frozenset().union(*read)
