"""The file that a process writes: which piece lies where, and the index beside it.

    pieces_00003.safetensors   header, then the pieces one after another; readable by any reader of that format
    pieces_00003.json          size, checksums of blocks; of each tensor its shape and type, and its pieces here

The types are ordered by size, so that every piece begins at a multiple of its own elements.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from megatron_mm.checkpoints.block_file import BLOCK, write_pieces
from megatron_mm.checkpoints.safetensors_header import DTYPE_NAMES, header
from megatron_mm.checkpoints.slots import Slot

#: Bytes that are brought to the host at once where a file is written from where its tensors are.
STAGED_AT_ONCE = 4 * BLOCK


def pieces_file(number: int) -> str:
    """Name of the file that a process writes."""
    return f"pieces_{number:05d}.safetensors"


def index_file(number: int) -> str:
    """Name of its index."""
    return f"pieces_{number:05d}.json"


@dataclass(frozen=True)
class Image:
    """A file of pieces, before it is written.

    Args:
        slots: what it holds.
    """

    slots: Sequence[Slot]

    @cached_property
    def ordered(self) -> list[Slot]:
        """Slots in the order of the file."""
        return sorted(self.slots, key=lambda slot: -slot.tensor.element_size())

    @cached_property
    def head(self) -> bytes:
        """Everything before the pieces."""
        return header(
            {
                _name(slot): (DTYPE_NAMES[slot.tensor.dtype], tuple(slot.tensor.shape), slot.tensor.nbytes)
                for slot in self.ordered
            }
        )

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.head) + sum(slot.tensor.nbytes for slot in self.slots)

    def tensors(self) -> dict[str, dict]:
        """Of each tensor its type, whole shape, and pieces as (first index, size, first byte in the file)."""
        at, found = len(self.head), {}
        for slot in self.ordered:
            entry = {"dtype": DTYPE_NAMES[slot.tensor.dtype], "shape": slot.shape, "pieces": []}
            found.setdefault(slot.key, entry)["pieces"].append((slot.offsets, tuple(slot.tensor.shape), at))
            at += slot.tensor.nbytes
        return found

    def write(self, folder: Path, number: int, values: Callable[[Slot], torch.Tensor] | None = None) -> None:
        """Writes the file and its index into a folder, through a buffer of `STAGED_AT_ONCE`.

        Args:
            number: of the process.
            values: as for `chunks`.
        """
        chunks = self.chunks(values) if values else self.chunks()
        write_pieces(*own_paths(folder, number), chunks, self.tensors())

    @torch.no_grad()
    def copy_to(self, memory: memoryview) -> None:
        """Puts the whole file into memory of its size, which is on the host."""
        memory[: len(self.head)] = self.head
        buffer = torch.frombuffer(memory, dtype=torch.uint8)
        at = len(self.head)
        for slot in self.ordered:
            size = slot.tensor.nbytes
            if size:
                target = buffer[at : at + size].view(slot.tensor.dtype).view(slot.tensor.shape)
                target.copy_(slot.tensor, non_blocking=True)
            at += size
        if any(slot.tensor.is_cuda for slot in self.slots):
            torch.cuda.current_stream().synchronize()

    def chunks(self, values: Callable[[Slot], torch.Tensor] = lambda slot: slot.tensor) -> Iterator[memoryview]:
        """The file, a buffer at a time, for `write_blocks`.

        Args:
            values: of a slot, whose own tensor may have a shape and a type alone.
        """
        staging = memoryview(mmap.mmap(-1, STAGED_AT_ONCE))
        filled = 0
        for data in self._bytes(values):
            while data:
                count = min(len(data), len(staging) - filled)
                staging[filled : filled + count] = data[:count]
                data, filled = data[count:], filled + count
                if filled == len(staging):
                    yield staging
                    filled = 0
        if filled:
            yield staging[:filled]

    def _bytes(self, values: Callable[[Slot], torch.Tensor]) -> Iterator[memoryview]:
        yield memoryview(self.head)
        for slot in self.ordered:
            flat = values(slot).detach().reshape(-1)
            step = max(1, STAGED_AT_ONCE // max(1, flat.element_size()))
            for begin in range(0, flat.numel(), step):
                part = flat[begin : begin + step].cpu().contiguous()
                yield memoryview(part.view(torch.uint8).numpy())


def _name(slot: Slot) -> str:
    """Of a piece among those of its file."""
    return f"{slot.key}[{','.join(f'{at}:{at + size}' for at, size in zip(*slot.region))}]"


def own_paths(folder: Path, number: int) -> tuple[Path, Path]:
    """The file that a process writes into a folder, and its index."""
    return folder / pieces_file(number), folder / index_file(number)
