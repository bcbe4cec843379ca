"""Safetensors folders read and written tensor by tensor, so that a 70B model passes through little memory.

The safetensors package maps a whole file or writes a whole dictionary; both hold more than one tensor. The format is
a header (eight bytes of length, JSON of names, types, shapes and offsets) before raw data, so plain reads and writes
at an offset do, and what is resident is the one tensor that the caller holds.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable
from pathlib import Path

import torch

from megatron_mm.checkpoints.safetensors_header import DTYPE_NAMES, DTYPES, header
from megatron_mm.config.documents import load_json, parse_json
from megatron_mm.media.files import open_file

INDEX = "model.safetensors.index.json"
#: Without those of 8 bits, whose numbers mean nothing without scales that other tensors hold.
_DTYPES = {name: dtype for name, dtype in DTYPES.items() if not name.startswith("F8")}
_MAX_HEADER = 100_000_000  # bytes, by the format's own reader
_WRITE_ELEMENTS = 1 << 22  # elements converted and written at once


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy()).cast("B")


class SafetensorsFolder:
    """Reads the tensors of a Hugging Face folder (one file, or shards with an index), or of one file.

    Raises:
        ValueError: there is no safetensors file, or one is missing, truncated or not safetensors; names it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._where: dict[str, tuple[Path, int, int, torch.dtype, tuple[int, ...]]] = {}
        for file in self._files():
            self._read_header(file)

    def _files(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        if not self.path.is_dir():
            raise ValueError(f"{self.path}: no such folder; give the folder of a Hugging Face model")
        index = self.path / INDEX
        if index.exists():
            try:
                names = sorted(set(load_json(index)["weight_map"].values()))
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise ValueError(f"{index}: not an index of safetensors shards ({error!r})") from error
            if elsewhere := [name for name in names if not isinstance(name, str) or os.path.basename(name) != name]:
                raise ValueError(f"{index}: names {elsewhere[0]!r}, which is not in the folder")
            return [self.path / name for name in names]
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            found = ", ".join(sorted(p.name for p in self.path.glob("*.bin"))) or "no weights"
            raise ValueError(
                f"{self.path}: no .safetensors file (found {found}); save the model with "
                "model.save_pretrained(folder) to get one"
            )
        return files

    def _read_header(self, file: Path) -> None:
        if not file.exists():
            raise ValueError(f"{file}: missing, though {INDEX} names it")
        size = file.stat().st_size
        try:
            with open_file(file) as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                if length > size:
                    raise ValueError(f"its header says {length} bytes, the file has {size}")
                if length > _MAX_HEADER:
                    raise ValueError(f"its header says {length} bytes; the format has at most {_MAX_HEADER}")
                header = parse_json(stream.read(length))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                (begin, end), shape, dtype = entry["data_offsets"], tuple(entry["shape"]), _DTYPES[entry["dtype"]]
                if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
                    raise ValueError(f"{name} has the shape {list(shape)} from byte {begin} to {end}")
                if 8 + length + end > size:
                    raise ValueError(f"{name} ends at byte {8 + length + end}, the file has {size}: it is cut off")
                if end - begin != math.prod(shape) * dtype.itemsize:  # before anything is allocated by it
                    raise ValueError(f"{name} has {end - begin} bytes, its shape {list(shape)} says otherwise")
                self._where[name] = (file, 8 + length + begin, end - begin, dtype, shape)
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise ValueError(f"{file}: not a whole safetensors file: {error}") from error

    def __contains__(self, name: str) -> bool:
        return name in self._where

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._where[name][4]

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, without reading it."""
        return self._where[name][3]

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor; KeyError if there is none of this name."""
        file, offset, length, dtype, shape = self._where[name]
        tensor = torch.empty(shape, dtype=dtype)
        if length:
            with open_file(file) as stream:
                stream.seek(offset)
                view, done = _bytes_of(tensor), 0
                while done < length:
                    count = stream.readinto(view[done:])
                    if not count:
                        raise ValueError(f"{file}: ends within {name}")
                    done += count
        return tensor


class SafetensorsWriter:
    """Writes shards of announced tensors in any order; `close` writes the index and checks that none is missing."""

    def __init__(
        self, folder: Path, plan: Iterable[tuple[str, tuple[int, ...]]], dtype: torch.dtype, max_shard_bytes: int
    ):
        self.folder, self.dtype = folder, dtype
        self._where: dict[str, tuple[Path, int, tuple[int, ...]]] = {}
        self._missing: set[str] = set()
        self.total_bytes = 0
        shards: list[list[tuple[str, tuple[int, ...], int]]] = [[]]
        filled = 0
        for name, shape in plan:
            size = math.prod(shape) * dtype.itemsize
            if shards[-1] and filled + size > max_shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append((name, shape, size))
            filled += size
        self.weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            self._begin_shard(f"model-{number:05d}-of-{len(shards):05d}.safetensors", shard)

    def _begin_shard(self, file_name: str, shard: list[tuple[str, tuple[int, ...], int]]) -> None:
        head = header({name: (DTYPE_NAMES[self.dtype], shape, size) for name, shape, size in shard})
        file, offset = self.folder / file_name, len(head)
        for name, shape, size in shard:
            self._where[name] = (file, offset, shape)
            self._missing.add(name)
            self.weight_map[name] = file_name
            offset += size
        with open(file, "wb") as stream:
            stream.write(head)
            stream.truncate(offset)
        self.total_bytes += offset - len(head)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one announced tensor, converted to the folder's type piece by piece."""
        file, offset, shape = self._where[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, announced as {list(shape)}")
        flat = tensor.detach().reshape(-1)
        with open(file, "r+b") as stream:
            stream.seek(offset)
            for piece in flat.split(_WRITE_ELEMENTS):
                stream.write(_bytes_of(piece.to(self.dtype).contiguous()))
        self._missing.discard(name)

    def close(self) -> None:
        """Write the index.

        Raises:
            ValueError: announced tensors were never written; names some.
        """
        if self._missing:
            raise ValueError(f"{len(self._missing)} tensors were not written, among them {sorted(self._missing)[:3]}")
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": self.weight_map}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
