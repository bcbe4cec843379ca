"""Reading checkpoints: any region of any tensor, whatever layout wrote it, with or without a process group.

Two formats are read: the pieces that are written now (image.py), each block of whose files is checked before anything
of it is used, and torch's distributed checkpoints, which were written before (torch_dist.py).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_mm.checkpoints import stated, torch_dist
from megatron_mm.checkpoints.block_file import BLOCK
from megatron_mm.checkpoints.folder import MANIFEST
from megatron_mm.checkpoints.image import own_paths
from megatron_mm.checkpoints.own_files import DamagedError
from megatron_mm.checkpoints.regions import Region, flat_range, overlap, rectangles, slices, tile
from megatron_mm.checkpoints.safetensors_header import DTYPES
from megatron_mm.checkpoints.slots import Slot
from megatron_mm.checkpoints.sources import Extent, FolderSource, PieceSource
from megatron_mm.models.names import checkpoint_key


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[tuple[Region, Any], ...]
    """Its regions, and where each is: what the format's `read` wants."""


#: Of each piece, by where it is: its region, and the regions that are to be filled from it.
Wanted = dict[Any, list[tuple[Region, Slot]]]


class CheckpointReader:
    """Tensors of one checkpoint.

    Args:
        where: its folder (`…/iter_0000100`), or where else the files of its pieces come from.

    Raises:
        ValueError: the folder is no whole checkpoint; says what is missing.
        DamagedError: a file of it is not what was written; from every method that reads.
    """

    def __init__(self, where: str | Path | PieceSource) -> None:
        source = FolderSource(Path(where)) if isinstance(where, str | Path) else where
        self.folder = source.name
        if isinstance(source, FolderSource) and torch_dist.is_one(self.folder):
            tensors, common, self._read = torch_dist.opened(self.folder)
            self.tensors = {key: StoredTensor(*stored) for key, stored in tensors.items()}
            self.common = common
        else:
            pieces = _Pieces(source)
            self.tensors, self.common, self._read = pieces.tensors, pieces.common, pieces.read

    def __contains__(self, name: str) -> bool:
        return any(key in self.tensors for key in (name, checkpoint_key(name)))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shape of every tensor, by key."""
        return {key: stored.shape for key, stored in self.tensors.items()}

    def weights(self) -> set[str]:
        """Keys of the model's parameters, as they stand in the checkpoint."""
        return {key for key in self.tensors if not key.startswith("optimizer.") and not key.endswith("_extra_state")}

    def files_of(self, key: str) -> list[str]:
        """Name of the file that holds each piece of a tensor."""
        places = (where for _, where in self.tensors[key].pieces)
        return [own_paths(self.folder, at[0])[0].name if type(at[0]) is int else at[1].name for at in places]

    def shape(self, name: str) -> tuple[int, ...]:
        """Whole shape of a parameter."""
        return self._stored(name)[1].shape

    def dtype(self, name: str) -> torch.dtype:
        """Type in which a parameter is stored."""
        return self._stored(name)[1].dtype

    def read(self, name: str) -> torch.Tensor:
        """A whole parameter."""
        key, stored = self._stored(name)
        check_whole(self.folder, key, stored)
        whole = torch.empty(stored.shape, dtype=stored.dtype)
        self.read_into([Slot(key, stored.shape, (0,) * len(stored.shape), whole)])
        return whole

    def read_into(self, slots: Iterable[Slot]) -> None:
        """Fills regions with what the checkpoint holds of them, converted to their types.

        Each process reads what it needs, in the order of the files, and no byte twice.

        Raises:
            ValueError: as `wanted`.
        """
        self.read_wanted(self.wanted(slots))

    @torch.no_grad()
    def read_wanted(self, wanted: Wanted) -> None:
        """Fills the regions of `wanted`."""
        self._read(wanted)

    def wanted(self, slots: Iterable[Slot]) -> Wanted:
        """The pieces that fill regions.

        Raises:
            ValueError: the checkpoint lacks a tensor, holds it in another shape, or lacks a part of it.
        """
        wanted: Wanted = defaultdict(list)
        for slot in slots:
            stored = self.tensors.get(slot.key)
            if stored is None:
                raise ValueError(f"{self.folder} holds no {slot.key}")
            if stored.shape != slot.shape:
                raise ValueError(f"{self.folder}: {slot.key} is {stored.shape}, where {slot.shape} is needed")
            found = 0
            for region, where in stored.pieces:
                if common := overlap(region, slot.region):
                    found += math.prod(common[1])
                    wanted[where].append((region, slot))
            if found != slot.tensor.numel():
                raise ValueError(f"{self.folder}: pieces of {slot.key} hold {found} of {slot.tensor.numel()} values")
        return wanted

    def _stored(self, name: str) -> tuple[str, StoredTensor]:
        for key in (name, checkpoint_key(name)):
            if key in self.tensors:
                return key, self.tensors[key]
        raise ValueError(f"{self.folder}: holds no {name}")


def check_whole(folder: Path, key: str, stored: StoredTensor) -> None:
    """Raises ValueError unless the pieces of a tensor have as many values as it, before memory is taken for them."""
    held = sum(math.prod(sizes) for (_, sizes), _ in stored.pieces)
    if held != math.prod(stored.shape):
        raise ValueError(f"{folder}: pieces of {key} hold {held} of {math.prod(stored.shape)} values")


_Job = tuple[int, int, int, Region, Slot]
"""(first byte, one past the last, first byte of the piece, its region, what wants a part of it)."""


def _by_block(jobs: Iterable[_Job]) -> Iterator[tuple[int, list[_Job]]]:
    """Blocks of a file that jobs, in the order of their bytes, want, each once, and which do."""
    waiting, active = iter(jobs), []
    following = next(waiting, None)
    block = 0
    while active or following:
        if not active and following:
            block = following[0] // BLOCK
        end = (block + 1) * BLOCK
        while following and following[0] < end:
            active.append(following)
            following = next(waiting, None)
        yield block, active
        active = [job for job in active if job[1] > end]
        block += 1


class _Pieces:
    """A checkpoint of files of pieces."""

    def __init__(self, source: PieceSource) -> None:
        self._source, folder = source, source.name
        try:
            self.common: Any = source.manifest()
            count = source.count(self.common)
            if not count:
                raise KeyError("pieces_*.safetensors")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{folder}: not a whole checkpoint (its {MANIFEST} names no pieces: {error!r}); give a folder like "
                "checkpoints/iter_0000100"
            ) from error
        self._extents: list[Extent] = []
        self.tensors: dict[str, StoredTensor] = {}
        for number in range(count):
            self._open(number)
        for key, found in self.tensors.items():
            if not tile([region for region, _ in found.pieces], found.shape):
                raise DamagedError(f"{folder}: pieces of {key} do not make up a tensor of {found.shape}")

    def _open(self, number: int) -> None:
        path, index = own_paths(self._source.name, number)
        try:
            said: Any = self._source.index(number)
            size, sums = said["bytes"], said["checksums"]
            actual = self._source.size(number)
            fits = actual is None or actual == size
            if type(size) is not int or not fits or len(sums) != -(-size // BLOCK) or said["block"] != BLOCK:
                raise DamagedError(f"{path} has {actual} bytes, and {index.name} is of another file")
            self._extents.append(Extent(size, sums))
            stretches: list[tuple[int, int]] = []
            for key, entry in said["tensors"].items():
                dtype, shape = DTYPES[entry["dtype"]], stated.sizes(entry["shape"], f"{key} is")
                before = self.tensors.get(key, StoredTensor(shape, dtype, ()))
                if (before.shape, before.dtype) != (shape, dtype):
                    raise DamagedError(f"{index}: {key} has another shape or type than in the other files")
                pieces = []
                for offsets, extents, at in entry["pieces"]:
                    region = stated.region(shape, offsets, extents)
                    stretches.append((at, math.prod(region[1]) * dtype.itemsize))
                    if at % dtype.itemsize:
                        raise ValueError(f"a piece of {key} begins at byte {at}, within a value")
                    pieces.append((region, (number, at)))
                self.tensors[key] = StoredTensor(shape, dtype, (*before.pieces, *pieces))
            stated.within_file(stretches, size)
        except FileNotFoundError as error:
            raise DamagedError(f"{error.filename} is missing") from error
        except DamagedError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{index} is no index of pieces: {error!r}") from error

    def read(self, wanted: dict[tuple[int, int], list[tuple[Region, Slot]]]) -> None:
        """Reads block after block of each file what is wanted of its pieces, by (file, first byte)."""
        by_file: dict[int, list[_Job]] = defaultdict(list)
        for (number, at), parts in wanted.items():
            for region, slot in parts:
                common = overlap(region, slot.region)
                assert common is not None
                first, last = flat_range(common, region)
                item = self.tensors[slot.key].dtype.itemsize
                by_file[number].append((at + first * item, at + last * item, at, region, slot))
        plans = {
            number: dict(_by_block(sorted(jobs, key=lambda job: job[:2]))) for number, jobs in sorted(by_file.items())
        }
        for number, block, data in self._source.blocks(
            {number: list(plan) for number, plan in plans.items()}, self._extents
        ):
            for _, _, at, region, slot in plans[number][block]:
                self._take(data, block * BLOCK, at, region, slot)

    def _take(self, data: memoryview, begin: int, at: int, region: Region, slot: Slot) -> None:
        """Copies what a block, which begins at a byte of its file, holds of a piece to where it is wanted."""
        dtype = self.tensors[slot.key].dtype
        item, count = dtype.itemsize, math.prod(region[1])
        first = max(0, (begin - at) // item)
        last = min(count, (begin + len(data) - at) // item)
        if first >= last:
            return
        values = torch.frombuffer(data, dtype=dtype, count=last - first, offset=at + first * item - begin)
        done = 0
        for offsets, sizes in rectangles(region[1], first, last):
            part = (tuple(base + offset for base, offset in zip(region[0], offsets)), sizes)
            some = values[done : done + math.prod(sizes)]
            done += some.numel()
            if common := overlap(part, slot.region):
                slot.tensor[slices(common, slot.region)].copy_(some.view(sizes)[slices(common, part)])
