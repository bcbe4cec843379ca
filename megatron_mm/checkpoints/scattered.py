"""Blocks of a checkpoint's files that lie on several nodes (local.py): read where they are seen, else received.

    all say which blocks they need of files that they do not see
    in one order for all, by file and block:   a process that sees the file ─ block ▶ all that need it

Every process walks through what concerns it in that order, so none waits for one that waits for it. A damaged block is
sent too, and found by each that takes it; all of the walk is done before an error is raised.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mm.checkpoints.block_file import BLOCK, check_block
from megatron_mm.checkpoints.image import own_paths
from megatron_mm.checkpoints.local import LocalSet
from megatron_mm.checkpoints.own_files import DamagedError, open_own, read_description
from megatron_mm.checkpoints.sources import Extent
from megatron_mm.config.documents import parse_json
from megatron_mm.platform.collectives import exchanged


class ScatteredSource:
    """The files of a set of local copies. Making it is collective, and so is `blocks`.

    Raises:
        DamagedError: an index cannot be read.
    """

    def __init__(self, found: LocalSet) -> None:
        self.name = found.folder
        self._found, self._copies = found, found.copies
        nodes = self._copies.nodes
        self._sees = [nodes.number in holders for holders in found.holders]
        self._senders = [_of(nodes.members[holders[0]], number) for number, holders in enumerate(found.holders)]
        indices: dict[int, bytes] = {}
        for number, sender in enumerate(self._senders):
            if sender == nodes.rank:
                try:
                    indices[number] = read_description(own_paths(self.name, number)[1])
                except (OSError, ValueError):
                    self._note(number, sender)
        self._indices = {n: text for own in exchanged(indices, self._copies.group) for n, text in own.items()}

    def manifest(self) -> dict[str, Any]:
        """What the manifests of all nodes say."""
        return self._found.facts

    def count(self, manifest: dict[str, Any]) -> int:
        """Processes that saved."""
        return len(self._found.holders)

    def index(self, number: int) -> Any:
        """What stands beside a file, wherever that is."""
        if number not in self._indices:
            path = own_paths(self.name, number)[1]
            raise DamagedError(f"{path} could not be read by rank {self._senders[number]}")
        return parse_json(self._indices[number])

    def size(self, number: int) -> None:
        """Was compared with the manifest where the file is."""

    def blocks(
        self, needed: Mapping[int, Sequence[int]], extents: Sequence[Extent]
    ) -> Iterator[tuple[int, int, memoryview]]:
        """Walks through what this process reads, sends and receives."""
        group, rank = self._copies.group, self._copies.nodes.rank
        foreign = {number: blocks for number, blocks in needed.items() if not self._sees[number]}
        takers: dict[tuple[int, int], list[int]] = defaultdict(list)
        for other, wanted in enumerate(exchanged(foreign, group)):
            for number, blocks in wanted.items():
                if self._senders[number] == rank:
                    for block in blocks:
                        takers[number, block].append(other)
        own = {(number, block) for number, blocks in needed.items() for block in blocks}
        buffer = torch.empty(BLOCK, dtype=torch.uint8)
        problem: str | None = None
        with ExitStack() as stack:
            opened: tuple[int, Any] = -1, None
            for number, block in sorted(own | takers.keys()):
                size, sums = extents[number]
                begin = block * BLOCK
                data = buffer[: min(BLOCK, size - begin)]
                view = memoryview(data.numpy())
                path, holder = own_paths(self.name, number)[0], self._copies.nodes.rank
                if self._sees[number]:
                    if opened[0] != number:
                        stack.close()
                        opened = number, _opened(path, stack)
                    _fill(opened[1], begin, view)
                    for work in [dist.isend(data, other, group) for other in takers.get((number, block), ())]:
                        work.wait()
                else:
                    holder = self._senders[number]
                    dist.recv(data, holder, group)
                if (number, block) not in own:
                    continue
                try:
                    check_block(view, begin, sums[block], f"{path} of rank {holder}'s node")
                except DamagedError as error:
                    problem = problem or str(error)
                    self._note(number, holder)
                else:
                    yield number, block, view
        if problem:
            raise DamagedError(problem)

    def _note(self, number: int, rank: int) -> None:
        """Remembers that the copy on a process's node is damaged."""
        members = self._copies.nodes.members
        node = next(node for node, ranks in enumerate(members) if rank in ranks)
        self._copies.damaged.add((node, self._found.save, number))


def _of(ranks: Sequence[int], number: int) -> int:
    """The process of a node that sends a file: each sends as many as the others."""
    return ranks[number % len(ranks)]


def _opened(path: Path, stack: ExitStack) -> Any:
    """A file until the stack is closed, None where it cannot be opened."""
    try:
        return stack.enter_context(open_own(path))
    except (OSError, ValueError):
        return None


def _fill(file: Any, begin: int, view: memoryview) -> None:
    """Reads what is there. Zeros take the place of what is not, or cannot be read: the checksum shows it."""
    got = 0
    try:
        if file is not None:
            file.seek(begin)
            while got < len(view) and (count := file.readinto(view[got:])):
                got += count
    except OSError:
        pass
    view[got:] = bytes(len(view) - got)
