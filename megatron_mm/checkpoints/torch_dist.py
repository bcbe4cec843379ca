"""Reading torch's distributed checkpoints as megatron-core wrote them here before: `.metadata` and `*.distcp` files.

    .metadata   a pickle: tensors, and of each piece its file, first byte and length
    *.distcp    pieces one after another, each as torch.save writes it: a zip archive with a pickle and the numbers
    common.pt   such an archive, with the position of the run

The pickles are read as records (records.py). The files have no checksums of their own, but every archive has a CRC-32
of each of its members, which is compared when a piece is read.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_mm.checkpoints import stated
from megatron_mm.checkpoints.image import index_file
from megatron_mm.checkpoints.own_files import DamagedError, open_own, read_description
from megatron_mm.checkpoints.records import STORAGES, Record, load_records
from megatron_mm.checkpoints.regions import Region, overlap, slices
from megatron_mm.checkpoints.slots import Slot

METADATA = ".metadata"
COMMON = "common.pt"


def is_one(folder: Path) -> bool:
    """Whether a folder holds such a checkpoint, and none of pieces."""
    return (folder / METADATA).exists() and not (folder / index_file(0)).exists()


def opened(folder: Path) -> tuple[dict[str, tuple], dict[str, Any], Callable[[dict], None]]:
    """A checkpoint's tensors (whole shape, type, pieces), its common values, and what reads pieces.

    Raises:
        DamagedError: a file cannot be read, or holds what no checkpoint does.
    """
    try:
        tensors = _tensors(folder, load_records(read_description(folder / METADATA)))
    except DamagedError:
        raise
    except Exception as error:  # a pickle that is damaged fails in any way
        raise DamagedError(f"{folder / METADATA} cannot be read: {_said(error)}") from error
    return tensors, _common(folder), _read


def _tensors(folder: Path, metadata: Record) -> dict[str, tuple]:
    storage = metadata.state["storage_data"]
    places = {(index.state["fqn"], index.state["offset"]): info.state for index, info in storage.items()}
    tensors: dict[str, tuple] = {}
    stretches: dict[Path, list[tuple[int, int]]] = defaultdict(list)
    for key, entry in metadata.state["state_dict_metadata"].items():
        if entry.name != "TensorStorageMetadata":
            continue
        dtype, shape = _dtype(entry.state["properties"].state), stated.sizes(entry.state["size"], f"{key} is")
        pieces: list[tuple[Region, tuple]] = []
        for chunk in entry.state["chunks"]:
            place = places[key, chunk.state["offsets"]]
            region = stated.region(shape, chunk.state["offsets"], chunk.state["sizes"])
            where = (key, _inside(folder, place["relative_path"]), place["offset"], place["length"])
            stretches[where[1]].append(where[2:])
            if math.prod(region[1]) * dtype.itemsize > where[3]:
                raise ValueError(f"a piece of {key} at {region} has {where[3]} bytes")
            pieces.append((region, where))
        tensors[key] = (shape, dtype, tuple(pieces))
    for path, own in stretches.items():
        stated.within_file(own, _size(path))
    return tensors


def _dtype(properties: Any) -> torch.dtype:
    """From the state of a record of a tensor's properties, which was a dictionary once."""
    dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a tensor of {dtype!r}")
    return dtype


def _inside(folder: Path, name: str) -> Path:
    if not isinstance(name, str) or os.path.basename(name) != name or name in ("", ".", ".."):
        raise ValueError(f"it names the file {name!r}, which is not beside it")
    return folder / name


def _size(path: Path) -> int:
    try:
        with open_own(path) as file:
            return os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing") from None


def _common(folder: Path) -> dict[str, Any]:
    path = folder / COMMON
    if not path.exists() and not path.is_symlink():
        return {}
    try:
        found = load_records(_members(io.BytesIO(read_description(path)))["data.pkl"])
        if not isinstance(found, dict):
            raise ValueError("it holds no dictionary")
        counts = {name: found[name] for name in ("iteration", "consumed_samples", "optimizer_step") if name in found}
        if any(type(count) is not int or count < 0 for count in counts.values()):
            raise ValueError(f"it counts {counts!r:.200}")
    except Exception as error:
        raise DamagedError(f"{path} cannot be read: {_said(error)}") from error
    return found


def _read(wanted: dict[tuple, list[tuple[Region, Slot]]]) -> None:
    """Copies pieces into what wants regions of them, each piece read once, in the order of the files."""
    for where in sorted(wanted, key=lambda where: where[1:3]):
        values = read_piece(where)
        for region, slot in wanted[where]:
            if common := overlap(region, slot.region):
                try:
                    source = values.reshape(region[1])[slices(common, region)]
                except RuntimeError as error:
                    raise DamagedError(f"{where[1]}: {where[0]} cannot be read: {error}") from error
                slot.tensor[slices(common, slot.region)].copy_(source)


def read_piece(where: tuple[str, Path, int, int]) -> torch.Tensor:
    """A piece, checked.

    Args:
        where: key, file, first byte and length.

    Raises:
        DamagedError: it is not what was written.
    """
    key, path, offset, length = where
    try:
        with open_own(path) as stream:
            stream.seek(offset)
            return _tensor(_members(io.BytesIO(stream.read(length))))
    except FileNotFoundError as error:
        raise DamagedError(f"{path} is missing; it holds {key}") from error
    except Exception as error:
        raise DamagedError(f"{path}: {key} cannot be read, the file is damaged: {_said(error)}") from error


def _members(stream: BinaryIO) -> dict[str, bytes]:
    """What an archive of torch's holds, by the names within its one folder, each compared with its CRC-32.

    Raises:
        ValueError, zipfile.BadZipFile: it is none, or takes more memory than it has bytes.
    """
    size = stream.seek(0, os.SEEK_END)
    with zipfile.ZipFile(stream) as archive:
        listed = archive.infolist()
        if any(item.compress_type != zipfile.ZIP_STORED or item.file_size != item.compress_size for item in listed):
            raise ValueError("a member of the archive is compressed, which torch does not do")
        stated.within_file(((item.header_offset, item.file_size) for item in listed), min(size, 1 << 62))
        return {item.filename.partition("/")[2]: archive.read(item) for item in listed}


def _tensor(members: dict[str, bytes]) -> torch.Tensor:
    """The tensor of an archive, which is a view of one of its members."""
    made = load_records(members["data.pkl"])
    if not isinstance(made, Record) or not made.name.startswith("_rebuild_tensor_v"):
        raise ValueError("it holds no tensor")
    (_, kind, key, *_), offset, shape, stride, *more = made.arguments
    dtype = STORAGES[kind.name] if kind.name in STORAGES else more[2]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a tensor of {dtype!r}")
    if members.get("byteorder", b"little") != b"little":
        raise ValueError("its numbers are of a machine of the other byte order")
    shape, stride = stated.sizes(shape, "a tensor of"), stated.sizes(stride, "steps of")
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype)
    data = bytearray(members[f"data/{key}"])
    last = offset + sum(step * (size - 1) for step, size in zip(stride, shape, strict=True))
    if type(offset) is not int or offset < 0 or last >= len(data) // dtype.itemsize or math.prod(shape) > last + 1:
        raise ValueError(f"a tensor of {shape} of {len(data)} bytes")
    values = torch.frombuffer(data, dtype=dtype, count=len(data) // dtype.itemsize)
    return values.as_strided(shape, stride, offset)


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError | OSError) else repr(error)
