"""Nodes, as local copies of checkpoints know them: the processes that see the same folder. And whose files each keeps.

    node 0: ranks 0-7 ─ files ▶ node 1: ranks 8-15 ─ files ▶ … ─ files ▶ node 0
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_mm.platform.collectives import exchanged

#: Begins the name of the file by which processes that see a folder find each other.
_PRESENT = ".process-"


@dataclass(frozen=True)
class Nodes:
    """All processes of a run by the node on which they are, and which of them this is."""

    members: tuple[tuple[int, ...], ...]
    """Ranks of each node, ascending; nodes in the order of their first."""
    rank: int

    @property
    def number(self) -> int:
        """Of the node of this process."""
        return next(number for number, ranks in enumerate(self.members) if self.rank in ranks)

    @property
    def is_keeper(self) -> bool:
        """Whether this process makes, names and removes the folders of its node."""
        return self.rank == self.members[self.number][0]

    def receiver(self, rank: int) -> int | None:
        """The process of the next node that keeps a copy of a rank's file; None where there is one node."""
        if len(self.members) == 1:
            return None
        number = next(number for number, ranks in enumerate(self.members) if rank in ranks)
        neighbour = self.members[(number + 1) % len(self.members)]
        return neighbour[self.members[number].index(rank) % len(neighbour)]

    def senders(self) -> list[int]:
        """Whose files this process keeps copies of."""
        return [rank for ranks in self.members for rank in ranks if self.receiver(rank) == self.rank]

    def kept(self, number: int) -> list[int]:
        """Ranks whose files are kept on a node: its own, and those of the node before it."""
        before = () if len(self.members) == 1 else self.members[number - 1]
        return [*self.members[number], *before]


def meet(folder: Path, group: dist.ProcessGroup) -> Nodes:
    """Finds out which processes see the same folder, which is made: each leaves a file there, until all have looked.

    Nothing that an earlier start, another machine's image or a copy of the folder left there is taken for a process.

    Raises:
        ValueError: a process cannot write its folder; the same on every process.
    """
    own = dist.get_rank()
    token = exchanged(uuid.uuid4().hex[:12] if own == 0 else None, group)[0]
    _raise_first(_problem(lambda: _leave(folder / f"{_PRESENT}{token}-{own}")), folder, group)
    seen: Sequence[int] = ()
    try:
        prefix = f"{_PRESENT}{token}-"
        seen = sorted(int(name.removeprefix(prefix)) for name in os.listdir(folder) if name.startswith(prefix))
        problem = None if own in seen else "a file that was just written is not there"
    except OSError as error:
        problem = f"{error.strerror}"
    _raise_first(problem, folder, group)
    views = exchanged(tuple(seen), group)
    for path in folder.glob(f"{_PRESENT}*"):
        with suppress(OSError):  # of a node's processes, one removes it
            path.unlink()
    for rank, view in enumerate(views):
        if any(views[other] != view for other in view):
            raise ValueError(
                f"checkpoint.local_folder {folder}: rank {rank} sees the files of ranks {list(view)} there, and these "
                "do not see the same; it must be a folder of each node's own, on its disk or in /dev/shm"
            )
    return Nodes(tuple(sorted(set(views))), own)


def _leave(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def _problem(act: Callable[[], object]) -> str | None:
    try:
        act()
    except OSError as error:
        return f"{error.strerror}"
    return None


def _raise_first(problem: str | None, folder: Path, group: dist.ProcessGroup) -> None:
    problems = exchanged((problem, str(folder)), group)
    for rank, (found, where) in enumerate(problems):
        if found:
            raise ValueError(f"checkpoint.local_folder {where}: rank {rank} cannot use it: {found}")
