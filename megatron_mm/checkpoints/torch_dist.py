"""Reading torch's distributed checkpoints as megatron-core wrote them here before: `.metadata` and `*.distcp` files.

`.metadata` is a pickle, which torch reads by running whatever it names. Here only the classes that such a file is made
of are admitted, and what the file names is read inside its own folder.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_mm.checkpoints.block_file import DamagedError
from megatron_mm.checkpoints.image import index_file
from megatron_mm.checkpoints.regions import Region, overlap, slices
from megatron_mm.checkpoints.slots import Slot

METADATA = ".metadata"
COMMON = "common.pt"
#: What `.metadata` is made of: plain records, whose construction does nothing else.
_ADMITTED = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.planner", name)
    for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
    ("torch.distributed._shard.metadata", "ShardMetadata"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
}  # fmt: skip


class _Records(pickle.Unpickler):
    """A reader of pickles of records."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ADMITTED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype | torch.memory_format):
            return value
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of tensors does")


def is_one(folder: Path) -> bool:
    """Whether a folder holds such a checkpoint, and none of pieces."""
    return (folder / METADATA).exists() and not (folder / index_file(0)).exists()


def opened(folder: Path) -> tuple[dict[str, tuple], dict[str, Any], Callable[[dict], None]]:
    """A checkpoint's tensors (whole shape, type, pieces), its common values, and what reads pieces.

    Raises:
        DamagedError: a file cannot be read, or holds what no checkpoint does.
    """
    try:
        with open(folder / METADATA, "rb") as file:
            metadata = _Records(file).load()
        tensors, stored = {}, {}
        for key, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                continue
            pieces: list[tuple[Region, tuple]] = []
            for chunk in entry.chunks:
                info = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
                region = (tuple(chunk.offsets), tuple(chunk.sizes))
                where = (key, _inside(folder, info.relative_path), int(info.offset), int(info.length))
                stored[where] = region
                pieces.append((region, where))
            tensors[key] = (tuple(entry.size), entry.properties.dtype, tuple(pieces))
    except Exception as error:  # a pickle that is damaged fails in any way
        raise DamagedError(f"{folder / METADATA} cannot be read: {error!r}") from error
    return tensors, _common(folder), _read


def _inside(folder: Path, name: str) -> Path:
    if not isinstance(name, str) or os.path.basename(name) != name or name in ("", ".", ".."):
        raise ValueError(f"it names the file {name!r}, which is not beside it")
    return folder / name


def _common(folder: Path) -> dict[str, Any]:
    path = folder / COMMON
    try:
        found = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
    except Exception as error:
        raise DamagedError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise DamagedError(f"{path} holds no dictionary")
    return found


def _read(wanted: dict[tuple, list[tuple[Region, Slot]]]) -> None:
    """Copies pieces into what wants regions of them, each piece read once, in the order of the files."""
    for where in sorted(wanted, key=lambda where: where[1:3]):
        key, path, offset, length = where
        try:
            with open(path, "rb") as stream:
                values = torch.load(_FileSlice(stream, offset, length), map_location="cpu", weights_only=True)
            for region, slot in wanted[where]:
                common = overlap(region, slot.region)
                if common:
                    source = values.reshape(region[1])[slices(common, region)]
                    slot.tensor[slices(common, slot.region)].copy_(source)
        except FileNotFoundError as error:
            raise DamagedError(f"{path} is missing; it holds {key}") from error
        except Exception as error:
            raise DamagedError(f"{path}: {key} cannot be read, the file is damaged: {error}") from error


class _FileSlice:
    """A read-only stretch of an open file, for torch.load."""

    def __init__(self, stream, begin: int, length: int):
        self._stream, self._begin, self._length, self._at = stream, begin, length, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")
        self._stream.seek(self._begin + self._at)
        count = self._stream.readinto(view[: max(0, min(len(view), self._length - self._at))])
        self._at += count
        return count

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        self._stream.seek(self._begin + self._at)
        data = self._stream.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data
