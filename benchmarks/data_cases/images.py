"""JPEGs a second, decoded, cropped at random, resized to 224 and normalised, in batches of 32 from reader workers.

Each side in a process of its own: ours through `MicrobatchLoader`; WebDataset and Megatron-Energon with Pillow for the
same crop (area 0.5–1, aspect 3/4–4/3, bicubic) and numpy for the same normalisation (image_peers.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.data import ROOT, Arguments, Figure
from benchmarks.data_cases import corpora

BATCH = 32
_OURS = """
import sys, time, json
from megatron_mm.config.schema import Config, DatasetConfig
from megatron_mm.config.section import changed
from megatron_mm.data.reading.dataset import build_datasets
from megatron_mm.data.reading.loader import MicrobatchLoader
shards, tokenizer, workers, images, batch = *sys.argv[1:3], *map(int, sys.argv[3:])
data = {"datasets": [DatasetConfig(path=shards)], "tokenizer": tokenizer, "seq_length": 16, "split": "1,0,0"}
config = changed(Config(), {
    **{f"data.{name}": value for name, value in data.items()}, "data.max_images_per_sample": 1,
    "model.vision.image_size": 224, "model.decoder.vocab_size": 32768,
})
train = build_datasets(config).train
loader = MicrobatchLoader(train, 0, batch, 0, 1, batch, {"images_ICHW"}, workers)
for _ in range(2 * workers + 2):
    next(loader)
began, count = time.perf_counter(), 0
while count < images:
    found = next(loader).images_ICHW
    assert found.shape[1:] == (3, 224, 224)
    count += found.shape[0]
print(json.dumps(count / (time.perf_counter() - began)))
loader.close()
"""


def _rate(command: list[str], **environment: str) -> float:
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(arguments: Arguments) -> Iterator[Figure]:
    """Rates and ratios."""
    tokenizer = str(corpora.tokenizer(arguments.folder, "bpe", arguments.smoke, 1000))
    shards = corpora.photo_shards(arguments.folder, tokenizer, arguments.smoke)
    photos = corpora.photos(arguments.folder, arguments.smoke)
    amounts = [str(arguments.workers), "64" if arguments.smoke else "3200", str(BATCH)]
    sides = {"ours": [sys.executable, "-c", _OURS, str(shards), tokenizer, *amounts]}
    if not arguments.smoke:
        peers = arguments.folder / "peers"
        subprocess.run([str(ROOT / "benchmarks" / "peers.sh"), str(peers)], check=True)
        script = str(Path(__file__).with_name("image_peers.py"))
        for peer in ("webdataset", "energon"):
            sides[peer] = [str(peers / "bin" / "python"), script, peer, str(photos), *amounts]
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(1 if arguments.smoke else arguments.repeats):
        for name, command in sides.items():
            rates[name].append(_rate(command, PYTHONPATH=str(ROOT) if name == "ours" else "", OMP_NUM_THREADS="1"))
    best = {name: max(values) for name, values in rates.items()}
    for name, rate in best.items():
        yield Figure("images", f"{name}, {arguments.workers} workers", rate, "images/s")
    for name, wanted in (("webdataset", ">= 1.3"), ("energon", ">= 1")):
        if name in best:
            yield Figure("images", f"ours / {name}", best["ours"] / best[name], "x", wanted)
