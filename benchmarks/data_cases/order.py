"""A blend of ten datasets with 10⁹ samples in all: how long it takes to open, what memory it takes, random access.

One text shard is written (two tokens a document), opened under ten names, and its packing planned for the first; the
other nine use links to the files of that plan, because planning ten times would show nothing more. Opening is measured
in a process of its own, as a run does it (`build_datasets`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.data import ROOT, Arguments, Figure

_DATASETS = 10
_BLOCK = 1 << 20
_CHILD = """
import json, sys, time
import numpy as np, psutil
from benchmarks.data_cases import order
from megatron_mm.data.reading.dataset import build_datasets
config = order.config(sys.argv[1], int(sys.argv[2]))
process = psutil.Process()
before, began = process.memory_info().rss, time.perf_counter()
train = build_datasets(config).train
seconds = time.perf_counter() - began
index = np.random.default_rng(0).integers(0, train.num_rows, 1 << 20)
train.microbatch([0], ())
memory = process.memory_info().rss - before
rates = []
for _ in range(3):
    began = time.process_time()
    for start in range(0, index.size, 1 << 14):
        train.locate(index[start : start + (1 << 14)])
    rates.append(index.size / (time.process_time() - began))
began = time.process_time()
for start in range(0, 1 << 14, 16):
    train.pieces(index[start : start + 16])
pieces = (1 << 14) / (time.process_time() - began)
print(json.dumps({"rows": train.num_rows, "seconds": seconds, "memory": memory, "rate": max(rates), "pieces": pieces}))
"""


def config(folder: str, datasets: int):
    """The blend, of different weights; each document is a row."""
    from megatron_mm.config.schema import Config, DatasetConfig
    from megatron_mm.config.section import changed

    names = [os.path.join(folder, f"shard{i}") for i in range(datasets)]
    return changed(
        Config(),
        {
            "data.datasets": [DatasetConfig(path=name, weight=1.0 + i) for i, name in enumerate(names)],
            "data.seq_length": 2,
            "data.split": "1,0,0",
            "data.plan_folder": os.path.join(folder, "plans"),
            "model.decoder.vocab_size": 1 << 15,
        },
    )


def _write(prefix: Path, documents: int) -> None:
    from megatron_mm.data.store.indexed import IndexedWriter

    writer = IndexedWriter(prefix, np.uint16)
    for start in range(0, documents, _BLOCK):
        count = min(_BLOCK, documents - start)
        writer.add_documents(np.zeros(2 * count, np.uint16), np.full(count, 2, np.int32))
    writer.finalize()
    writer.tidy()


def run(arguments: Arguments) -> Iterator[Figure]:
    """Planning, start-up, memory, random access."""
    from megatron_mm.data.reading.dataset import build_datasets

    documents = 100_000 if arguments.smoke else 100_000_000
    folder = arguments.folder / f"order-{documents}"
    if not (folder / "shard0.idx").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        _write(folder / "shard", documents)
        for suffix in (".bin", ".idx"):
            for i in range(1, _DATASETS):
                os.link(folder / f"shard{suffix}", folder / f"shard{i}{suffix}")
            os.rename(folder / f"shard{suffix}", folder / f"shard0{suffix}")
    plans = folder / "plans"
    if not plans.exists():
        began = time.perf_counter()
        build_datasets(config(str(folder), 1))
        yield Figure(
            "order", "packing a dataset for the first time", documents / (time.perf_counter() - began) / 1e6, "M docs/s"
        )
        _share_plan(plans, folder, documents)
    command = [sys.executable, "-c", _CHILD, str(folder), str(_DATASETS)]
    found = []
    for _ in range(arguments.repeats):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
        if done.returncode:
            raise SystemExit(f"error: {done.stderr[-2000:]}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    rows = found[0]["rows"]
    yield Figure(
        "order",
        f"opening a blend of {_DATASETS} datasets, {rows:,} samples",
        min(f["seconds"] for f in found),
        "s",
        "<= 1",
    )
    yield Figure("order", "memory that it takes", min(f["memory"] for f in found) / 1e6, "MB", "<= 100")
    yield Figure(
        "order", "random access: dataset, epoch and row", max(f["rate"] for f in found) / 1e6, "M/s a core", ">= 1"
    )
    yield Figure(
        "order",
        "random access in sixteens: documents of the rows too",
        max(f["pieces"] for f in found) / 1e6,
        "M/s a core",
    )


def _share_plan(plans: Path, folder: Path, documents: int) -> None:
    """Links the one plan under the digests of the other datasets."""
    from megatron_mm.data.reading import plans as module

    (made,) = (path for path in plans.iterdir() if path.is_dir())

    def link(path: str, *_) -> None:
        os.mkdir(path)
        for name in os.listdir(made):
            os.link(made / name, os.path.join(path, name))

    make, module._make = module._make, link
    try:
        from megatron_mm.data.reading.dataset import build_datasets

        build_datasets(config(str(folder), _DATASETS))
    finally:
        module._make = make
