"""Peers of images.py, run by the interpreter of their own environment:  image_peers.py PEER TARS WORKERS IMAGES BATCH.

Prints images a second.
"""

import io
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)
STD = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)


def pixels(image: Image.Image) -> torch.Tensor:
    """A random resized crop, float32 [3, 224, 224]."""
    image = image.convert("RGB")
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(0.5, 1)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w <= width and h <= height:
            break
    else:
        w = h = min(width, height)
    left, top = random.randint(0, width - w), random.randint(0, height - h)
    image = image.resize((224, 224), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
    values = np.asarray(image, np.float32) * (1 / (255 * STD)) - MEAN / STD
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def webdataset_batches(tars: str, workers: int, batch: int):
    import webdataset

    files = sorted(map(str, Path(tars).glob("*.tar")))
    dataset = webdataset.WebDataset(files, resampled=True, shardshuffle=False).decode("pil").to_tuple("jpg", "txt")
    dataset = dataset.map_tuple(pixels, lambda text: text).batched(batch)
    for images, _ in webdataset.WebLoader(dataset, batch_size=None, num_workers=workers):
        yield images


def energon_batches(tars: str, workers: int, batch: int):
    from megatron.energon import (
        DefaultTaskEncoder,
        SkipSample,  # noqa: F401  (a release without it is too old)
        WorkerConfig,
        get_loader,
        get_train_dataset,
    )

    class Encoder(DefaultTaskEncoder):
        def encode_sample(self, sample):
            image = sample.image
            sample.image = pixels(Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image)
            return sample

    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(Path(tars).glob("*.tar")):
            shutil.copy(path, folder)
        command = [str(Path(sys.executable).with_name("energon")), "prepare", folder, "--non-interactive"]
        command += ["--split-parts", "train:photos-.*", "--sample-type", "CaptioningSample"]
        command += ["--field-map", json.dumps({"image": "jpg", "caption": "txt"})]
        subprocess.run(command, check=True, capture_output=True)
        config = WorkerConfig(rank=0, world_size=1, num_workers=workers)
        dataset = get_train_dataset(
            folder, worker_config=config, batch_size=batch, task_encoder=Encoder(), shuffle_buffer_size=None,
            max_samples_per_sequence=None, image_decode="pil",
        )  # fmt: skip
        for sample in get_loader(dataset):
            yield sample.image


def main() -> None:
    peer, tars, workers, images, batch = *sys.argv[1:3], *map(int, sys.argv[3:])
    batches = {"webdataset": webdataset_batches, "energon": energon_batches}[peer](tars, workers, batch)
    for _ in range(2 * workers + 2):
        next(batches)
    began, count = time.perf_counter(), 0
    while count < images:
        found = next(batches)
        assert found.shape[1:] == (3, 224, 224)
        count += found.shape[0]
    print(json.dumps(count / (time.perf_counter() - began)), flush=True)


if __name__ == "__main__":
    main()
