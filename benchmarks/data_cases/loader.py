"""Share of its time that a training step of synapse-tiny waits for data, reading photographs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.data import ROOT, Arguments, Figure
from benchmarks.data_cases import corpora


def run(arguments: Arguments) -> Iterator[Figure]:
    """One process with reader workers."""
    output = arguments.folder / "loader"
    shutil.rmtree(output, ignore_errors=True)
    tokenizer = str(corpora.tokenizer(arguments.folder, "bpe", arguments.smoke, 1000))
    shards = corpora.photo_shards(arguments.folder, tokenizer, arguments.smoke)
    steps = 3 if arguments.smoke else 50
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command += [str(ROOT / "pretrain_multimodal.py"), "--config", str(ROOT / "megatron_mm/recipes/synapse-tiny.yaml")]
    command += ["--logging.output", str(output), "--data-path", str(shards), "--data.tokenizer", tokenizer]
    command += [
        "--train-iters",
        str(steps),
        "--training.eval-interval",
        "0",
        "--num-workers",
        str(arguments.workers),
        "--lr-warmup-iters",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)}\n{done.stderr[-2000:]}")
    lines = (json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines())
    rows = [row for row in lines if "data_time" in row][min(5, steps - 1) :]
    waited, took = (sum(row[name] for row in rows) for name in ("data_time", "iteration_time"))
    yield Figure("loader", f"a training step, {arguments.workers} workers", took / len(rows), "s")
    yield Figure("loader", "share of the step that waits for data", 100 * waited / took, "%", "<= 2")
