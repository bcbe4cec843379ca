"""Packing plans of large datasets, made once and kept in files: a run of any size starts in milliseconds.

    PLANS/<digest>/
        pieces.npy, row_starts.npy   the arrays of a `Packing`, memory-mapped
        plan.json                    its report, and what it was made of and for

The digest names the dataset, its state, the documents, the limits and the key, so another split, seed or length of rows
makes another plan. The first process that needs a plan makes it, the others wait; a folder appears when it is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass

import numpy as np
from tqdm import tqdm

from megatron_mm.config.documents import load_json
from megatron_mm.config.inputs import Limits
from megatron_mm.data.reading.packing import PIECE_DTYPE, Packing, pack
from megatron_mm.data.store.arrays import load_array
from megatron_mm.data.store.manifest import CHECKSUM
from megatron_mm.data.store.shards import Shard
from megatron_mm.media.errors import DataError
from megatron_mm.platform.atomic_files import give_name, sync

#: Documents from which on a plan is kept; fewer are packed at every start (0.1 s).
KEPT_FROM = 1 << 16
_VERSION = 1


@dataclass(frozen=True)
class StoredPacking(Packing):
    """A packing in files."""

    folder: str

    def __reduce__(self):
        return open_plan, (self.folder,)


def plan(
    shard: Shard, documents: range, limits: Limits, key: list[int] | None, packed: bool, folder: str | None = None
) -> Packing:
    """The packing of documents (`packing.pack`), from its files if it is large and was made before.

    Args:
        folder: where plans are kept; None: PATH.plans beside the dataset.

    Raises:
        DataError: the folder cannot be written, or the dataset is damaged.
    """
    if len(documents) < KEPT_FROM:
        return pack(shard, documents, limits, key, packed)
    made_of = {
        "version": _VERSION,
        "dataset": _identity(shard),
        "documents": [documents.start, documents.stop],
        "limits": asdict(limits),
        "key": key,
        "packed": packed,
    }
    digest = hashlib.blake2b(json.dumps(made_of, sort_keys=True).encode(), digest_size=12).hexdigest()
    plans = folder or f"{shard.path}.plans"
    path = os.path.join(plans, digest)
    if os.path.isdir(path):  # also where nothing may be written any more
        return open_plan(path)
    try:
        os.makedirs(plans, exist_ok=True)
        with open(f"{path}.lock", "a", encoding="utf-8") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)  # another process may make it; if that one ends early, this one does
            if not os.path.isdir(path):
                _make(path, made_of, shard, documents, limits, key, packed)
    except OSError as error:
        raise DataError(
            f"{plans}: the packing plan of {shard.path} cannot be kept there ({error.strerror or error}); set "
            "data.plan_folder to a folder with room that all processes see"
        ) from error
    return open_plan(path)


def _identity(shard: Shard) -> list:
    """What tells a dataset from another, and from itself before a change."""
    index = shard.text.prefix + ".idx"
    stat = os.stat(index)
    return [os.path.abspath(shard.path), shard.manifest.get(CHECKSUM), stat.st_size, stat.st_mtime_ns]


def _make(
    path: str, made_of: dict, shard: Shard, documents: range, limits: Limits, key: list[int] | None, packed: bool
) -> None:
    making = f"{path}.making"
    shutil.rmtree(making, ignore_errors=True)
    os.makedirs(making)

    def allocate(name: str, dtype: np.dtype, size: int) -> np.ndarray:
        return np.lib.format.open_memmap(os.path.join(making, f"{name}.npy"), "w+", dtype, (size,))

    shard.check()
    with tqdm(total=len(documents), unit="doc", unit_scale=True, desc=f"packing {shard.name}", mininterval=0.5) as bar:
        packing = pack(shard, documents, limits, key, packed, allocate, bar.update)
    for array in (packing.pieces, packing.row_starts):
        array.flush()
    for name in ("arrived", "rows", "filled"):
        os.remove(os.path.join(making, f"{name}.npy"))
    with open(os.path.join(making, "plan.json"), "w", encoding="utf-8") as stream:
        json.dump({"report": packing.report, **made_of}, stream, indent=2)
        sync(stream)
    give_name(making, path)


def open_plan(folder: str) -> StoredPacking:
    """A plan that was made before.

    Raises:
        DataError: it is damaged; it may be removed, and is then made again.
    """
    advice = "remove the folder, and it is made again"
    try:
        report = load_json(os.path.join(folder, "plan.json"))["report"]
        pieces, row_starts = (load_array(os.path.join(folder, f"{n}.npy")) for n in ("pieces", "row_starts"))
        rows = int(report["rows"])
    except Exception as error:  # a damaged header ends in whatever Python's parser raises
        raise DataError(f"{folder}: a damaged packing plan ({error}); {advice}") from error
    if pieces.dtype != PIECE_DTYPE or row_starts.shape != (rows + 1,) or int(row_starts[-1]) != pieces.size:
        raise DataError(f"{folder}: a damaged packing plan (its arrays are not of its report); {advice}")
    return StoredPacking(pieces, row_starts, report, folder)
