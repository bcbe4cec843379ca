"""The copy of a process's file on the next node, sent while training goes on, from the memory in which its image lies.

    rank of node k   memory ─ checksums ─┐
                          └─ 16 MiB at a time, then the index ──▶ rank of node k + 1 ─ blocks ─▶ disk, index

Each sends one file and receives those that fall to it, in a thread, over a group that nothing else uses meanwhile. All
sends are posted before anything is received, so that no process waits for one that waits for it.
"""

from __future__ import annotations

import json
import mmap
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mm.checkpoints.block_file import BLOCK, checksums, index_text, write_blocks, write_index
from megatron_mm.checkpoints.folder import one_line
from megatron_mm.checkpoints.image import own_paths
from megatron_mm.checkpoints.nodes import Nodes

#: Bytes of a message.
_MESSAGE = 4 * BLOCK


class NeighbourCopy:
    """The exchange of one save.

    Args:
        nodes: who sends to whom.
        group: gloo, used by nothing else until `ended`.
        memory: the file of this process, which stays as it is until `ended`.
        tensors: what its index says of each tensor.
        sizes: bytes of the file of every process.
        folder: takes the files of others.
    """

    def __init__(
        self,
        nodes: Nodes,
        group: dist.ProcessGroup,
        memory: memoryview,
        tensors: dict[str, dict],
        sizes: Sequence[int],
        folder: Path,
    ) -> None:
        self.problem: str | None = None
        """What went wrong, once it has ended."""
        self._nodes, self._group, self._sizes, self._folder = nodes, group, sizes, folder
        self._thread = threading.Thread(target=self._run, args=(memory, tensors), daemon=True, name="neighbour copy")
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether this process has sent and received everything."""
        return not self._thread.is_alive()

    def _run(self, memory: memoryview, tensors: dict[str, dict]) -> None:
        try:
            sending = self._send(memory, tensors)
            for rank in self._nodes.senders():
                self._receive(rank)
            for work in sending:
                work.wait()
        except Exception as error:  # whatever the network does, the step after it says so
            self.problem = self.problem or one_line(error)

    def _send(self, memory: memoryview, tensors: dict[str, dict]) -> list[dist.Work]:
        to = self._nodes.receiver(self._nodes.rank)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        works = [dist.isend(part, to, self._group) for part in whole.split(_MESSAGE)]
        text = index_text(len(memory), checksums(memory), tensors).encode()
        index = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return [*works, *(dist.isend(part, to, self._group) for part in (torch.tensor([len(text)]), index))]

    def _receive(self, rank: int) -> None:
        """Writes what a process sends; where that cannot be written, it is taken nevertheless: the sender waits."""
        path, index = own_paths(self._folder, rank)
        parts, size, sums = self._parts(rank), 0, []
        try:
            size, sums = write_blocks(path, parts)
        except OSError as error:
            self.problem = self.problem or one_line(error)
        for _ in parts:
            pass
        length = torch.zeros(1, dtype=torch.int64)
        dist.recv(length, rank, self._group)
        text = torch.empty(int(length), dtype=torch.uint8)
        dist.recv(text, rank, self._group)
        if self.problem:
            return
        stated = json.loads(bytes(text.numpy()))
        if (stated["bytes"], stated["checksums"]) != (size, sums):
            self.problem = f"{path} is not what rank {rank} sent: its checksums differ"
            return
        try:
            write_index(index, bytes(text.numpy()).decode())
        except OSError as error:
            self.problem = one_line(error)

    def _parts(self, rank: int) -> Iterator[memoryview]:
        """The file of a process, a message at a time: one is written while the next comes."""
        size = self._sizes[rank]
        buffers = [mmap.mmap(-1, _MESSAGE), mmap.mmap(-1, _MESSAGE)]
        coming = None
        for number, begin in enumerate(range(0, size, _MESSAGE)):
            buffer = memoryview(buffers[number % 2])[: min(_MESSAGE, size - begin)]
            following = dist.irecv(torch.frombuffer(buffer, dtype=torch.uint8), rank, self._group), buffer
            if coming is not None:
                coming[0].wait()
                yield coming[1]
            coming = following
        if coming is not None:
            coming[0].wait()
            yield coming[1]
