"""Weights of a training checkpoint read and written tensor by tensor, in one process, without a process group.

Training saves with megatron-core's `dist_checkpointing` in the torch_dist format: torch's distributed checkpoint
(`.metadata` and `*.distcp` files) beside `metadata.json` and `common.pt`. Every key is a global tensor made of chunks,
whatever layout wrote it, so one process can put a tensor together, and write one that any layout loads.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType

from megatron_mm.models.names import checkpoint_key

_ROW_CHUNKS = 8  # chunks a tensor is written in where its rows divide: a tensor-parallel rank then reads only its own


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


class CheckpointReader:
    """Reads tensors of one checkpoint folder (`…/iter_0000100`) by training parameter name.

    Raises:
        ValueError: the folder is no whole checkpoint; says what is missing.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / ".metadata").exists():
            raise ValueError(
                f"{self.folder}: not a whole checkpoint (no .metadata); give a folder like checkpoints/iter_0000100"
            )
        try:
            self._metadata = dcp.FileSystemReader(self.folder).read_metadata()
        except Exception as error:
            raise ValueError(f"{self.folder}/.metadata cannot be read: {error!r}") from error

    def _entry(self, name: str) -> tuple[str, TensorStorageMetadata]:
        for key in (name, checkpoint_key(name)):
            entry = self._metadata.state_dict_metadata.get(key)
            if isinstance(entry, TensorStorageMetadata):
                return key, entry
        raise ValueError(f"{self.folder}: holds no {name}")

    def __contains__(self, name: str) -> bool:
        return any(key in self._metadata.state_dict_metadata for key in (name, checkpoint_key(name)))

    def weights(self) -> set[str]:
        """Keys of the model's parameters, as they stand in the checkpoint."""
        found = self._metadata.state_dict_metadata.items()
        tensors = {key for key, entry in found if isinstance(entry, TensorStorageMetadata)}
        return {key for key in tensors if not key.startswith("optimizer.") and not key.endswith("_extra_state")}

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape of a parameter."""
        return tuple(self._entry(name)[1].size)

    def dtype(self, name: str) -> torch.dtype:
        """Type in which a parameter is stored."""
        return self._entry(name)[1].properties.dtype

    def read(self, name: str) -> torch.Tensor:
        """The whole parameter, whatever layout saved it; ValueError if a file of it is missing or damaged."""
        key, entry = self._entry(name)
        if len(entry.chunks) == 1:
            return self._read_chunk(key, entry.chunks[0])
        out = torch.empty(entry.size, dtype=entry.properties.dtype)
        filled = 0
        for chunk in entry.chunks:
            piece = self._read_chunk(key, chunk)
            region = out
            for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes)):
                region = region.narrow(dim, offset, size)
            region.copy_(piece)
            filled += piece.numel()
        if filled != out.numel():
            raise ValueError(f"{self.folder}: chunks of {name} hold {filled} of {out.numel()} values")
        return out

    def _read_chunk(self, key: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        info = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        file = self.folder / info.relative_path
        try:
            with open(file, "rb") as stream:
                view = _FileSlice(stream, info.offset, info.length)
                return torch.load(view, map_location="cpu", weights_only=True).reshape(tuple(chunk.sizes))
        except FileNotFoundError as error:
            raise ValueError(f"{file}: missing; it holds {key}") from error
        except Exception as error:
            raise ValueError(f"{file}: {key} cannot be read, the file is damaged: {error}") from error


class _StreamingPlanner(SavePlanner):
    """Plans all tensors from their shapes and makes each one only when it is written."""

    def __init__(self, tensors: Iterable[tuple[str, tuple[int, ...]]], dtype: torch.dtype, make: Callable):
        self._tensors, self._dtype, self._make = list(tensors), dtype, make
        self._current: tuple[str, torch.Tensor] | None = None

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, shape in self._tensors:
            count = math.gcd(shape[0], _ROW_CHUNKS) if len(shape) > 1 else 1
            rows = shape[0] // count
            for start in range(0, shape[0], rows):
                chunk = ChunkStorageMetadata(
                    offsets=torch.Size([start] + [0] * (len(shape) - 1)), sizes=torch.Size([rows, *shape[1:]])
                )
                data = TensorWriteData(chunk, TensorProperties(dtype=self._dtype), torch.Size(shape))
                items.append(WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def create_global_plan(self, all_plans):
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        name = write_item.index.fqn
        if self._current is None or self._current[0] != name:
            self._current = None
            self._current = (name, self._make(name))
        chunk = write_item.tensor_data.chunk
        rows = self._current[1][chunk.offsets[0] : chunk.offsets[0] + chunk.sizes[0]]
        return rows.to(self._dtype, copy=True)  # a view would keep the whole tensor until the next one is written


def _key_among(name: str, names: Collection[str]) -> str:
    """The key of a parameter of a model with parameters of these names.

    A norm is spelled as part of the linear layer that follows it only where there is one: a user's own layer may have a
    norm of the same name before anything else.
    """
    key = checkpoint_key(name)
    linear, fused, _ = key.rpartition("layer_norm_")
    return key if not fused or f"{linear}weight" in names else name


def write_checkpoint_weights(
    folder: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, make: Callable[[str], torch.Tensor],
    common: dict,
) -> None:  # fmt: skip
    """Write the weights of a training checkpoint.

    Args:
        folder: the checkpoint folder, which exists and is empty.
        shapes: global shape of each training parameter.
        dtype: type to store.
        make: gives the tensor of a training parameter, called once each, in order.
        common: what `common.pt` holds beside the weights.
    """
    by_key = {_key_among(name, shapes): name for name in shapes}
    plan = [(key, shapes[name]) for key, name in by_key.items()]
    planner = _StreamingPlanner(plan, dtype, lambda key: make(by_key[key]))
    writer = dcp.FileSystemWriter(folder, thread_count=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as no_dist asks
        dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    torch.save(common, folder / "common.pt")
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    common_backend = {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backend | common_backend))
