"""A small real corpus for tests of whole runs: drawings, tones and captions, built by the project's own builders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image, ImageDraw

from megatron_mm.config.schema import DatasetConfig
from megatron_mm.config.section import changed
from megatron_mm.data.build.multimodal import build_multimodal
from megatron_mm.data.build.train_tokenizer import train_tokenizer
from tests.support.recipes import small_config

_COLOURS = ("red", "green", "blue", "black", "orange", "purple")


def write_corpus(folder: Path, count: int = 120) -> Path:
    """JSONL of samples: an image, a sound, both, two images, or text alone."""
    lines = []
    for i in range(count):
        colour, kind = _COLOURS[i % len(_COLOURS)], i % 5
        record: dict = {"id": f"s{i}", "text": f"a {colour} disc", "prompt": ""}
        if kind in (0, 2, 3):
            names = [f"{i}-{k}.png" for k in range(2 if kind == 3 else 1)]
            for name in names:
                image = Image.new("RGB", (24, 20), "white")
                ImageDraw.Draw(image).ellipse((2 + i % 3, 2, 18, 18), fill=colour)
                image.save(folder / name)
            record |= {"images": names, "prompt": "<image>" * len(names)}
        if kind in (1, 2):
            wave = 0.3 * np.sin(np.arange(3200) * 0.02 * (1 + i % len(_COLOURS)))
            soundfile.write(folder / f"{i}.wav", wave, 16000)
            record |= {"audios": [f"{i}.wav"], "prompt": record["prompt"] + "<audio>"}
        lines.append(json.dumps(record))
    path = folder / "samples.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def build_corpus(folder: Path) -> tuple[Path, Path]:
    """(dataset folder, tokenizer) of the corpus."""
    folder.mkdir(parents=True, exist_ok=True)
    samples, tokenizer, dataset = write_corpus(folder), folder / "t.model", folder / "discs"
    train_tokenizer([str(samples)], str(tokenizer), 300, json_keys=["text"], num_threads=1)
    build_multimodal([str(samples)], str(dataset), str(tokenizer), workers=0, progress=False)
    return dataset, tokenizer


def corpus_config(dataset: Path, tokenizer: Path, output: Path):
    """The small recipe reading the corpus."""
    config = changed(
        small_config(),
        {
            "model.decoder.vocab_size": 304,
            "data.datasets": [DatasetConfig(path=str(dataset))],
            "data.tokenizer": str(tokenizer),
            "data.split": "9,1,0",
            "data.log_sample_ids": True,
            "logging.output": str(output),
        },
    )
    return config
