"""Records of the work that a node gives one process for one microbatch: what a plan of time is made of.

Every record is of the forward pass and says how often its work is done there (`count`). FLOPs are sums over records.
The passes of training follow by rule (planner/costs.py): a weight's product is run again for the gradient of its input
(dgrad) and of its weight (wgrad). What is communicated differs by pass, so a collective says during which it runs.

Bytes and lengths are those of one process, of its share under tensor, context and sequence parallelism.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

#: Forward; gradient of the inputs; gradient of the weights.
Pass = Literal["forward", "dgrad", "wgrad"]
#: Tensor, context and data parallelism.
Group = Literal["tp", "cp", "dp"]


@dataclass(frozen=True)
class MatrixProduct:
    """`count` products [m, k] x [k, n]."""

    m: int
    n: int
    k: int
    count: int = 1
    what: str = ""

    @property
    def flops(self) -> int:
        """A multiply-add is two."""
        return 2 * self.m * self.n * self.k * self.count

    def during(self, of: Pass) -> MatrixProduct:
        """The product of a pass: [m, n] x [n, k] for the input's gradient, [k, m] x [m, n] for the weight's."""
        m, n, k = {
            "forward": (self.m, self.n, self.k),
            "dgrad": (self.m, self.k, self.n),
            "wgrad": (self.k, self.n, self.m),
        }[of]
        return replace(self, m=m, n=n, k=k)


@dataclass(frozen=True)
class Attention:
    """softmax(q kᵀ) v without stored scores.

    Attributes:
        sequences: batches of queries, each with keys of its own.
        queries, keys: positions of a sequence.
        heads: of the queries; `key_value_heads` are fewer where queries are grouped.
        causal: earlier keys only, which lets a kernel leave out nearly half; FLOPs count in full.
    """

    sequences: int
    queries: int
    keys: int
    heads: int
    key_value_heads: int
    head_dim: int
    causal: bool = False
    count: int = 1
    what: str = ""

    @property
    def flops(self) -> int:
        """Of both products, whatever the mask: the convention of MFU and of torch's FlopCounterMode."""
        return 4 * self.sequences * self.queries * self.keys * self.heads * self.head_dim * self.count

    @property
    def visible(self) -> float:
        """Share of the pairs of query and key that a causal mask leaves, where a row is one document."""
        return (self.keys + 1) / (2 * self.keys) if self.causal and self.keys else 1.0

    def during(self, of: Pass) -> Attention:
        """Counted alike in each pass."""
        return self


@dataclass(frozen=True)
class Moved:
    """`count` kernels that are bound by memory: each reads and writes `bytes` in all (norms, look-ups, activations)."""

    bytes: int
    count: int = 1
    what: str = ""

    @property
    def flops(self) -> int:
        """Not counted."""
        return 0


@dataclass(frozen=True)
class Collective:
    """`count` collectives of a group.

    Attributes:
        bytes: of the larger of what a process gives and what it gets: the whole tensor in a gather or reduce-scatter.
        runs: the pass that communicates this; whoever states a layer states the collectives of all three.
    """

    kind: Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_receive"]
    group: Group
    bytes: int
    count: int = 1
    runs: Pass = "forward"
    what: str = ""

    @property
    def flops(self) -> int:
        """None."""
        return 0


Work = MatrixProduct | Attention | Moved | Collective


def merged(records: Iterable[Work]) -> tuple[Work, ...]:
    """Each kind of record once, in the order of their first, its counts added."""
    counts: Counter[Work] = Counter()
    for record in records:
        counts[replace(record, count=1)] += record.count
    return tuple(replace(record, count=count) for record, count in counts.items() if count)


def share(total: int, processes: int, what: str) -> int:
    """What one of some processes has of a total.

    Raises:
        ValueError: it does not divide.
    """
    if total % processes:
        raise ValueError(f"{what}: {total} do not divide over {processes} processes")
    return total // processes
