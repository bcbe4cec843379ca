"""Small real data for the data tests: drawings, tones, animations, their captions, a tokenizer, a built folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image, ImageDraw

from megatron_mm.config.schema import Config, DatasetConfig
from megatron_mm.config.section import changed
from megatron_mm.data.build.multimodal import build_multimodal
from megatron_mm.data.build.train_tokenizer import train_tokenizer

COLOURS = ("red", "green", "blue", "orange")


def write_samples(folder: Path, count: int = 60) -> Path:
    """Writes samples with every mix of media: two images, one, none; sounds; animations; prompts or none."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        colour = COLOURS[i % 4]
        record: dict = {"text": f"a {colour} ball, number {i}, on white"}
        prompt = ""
        images = [f"{i}-{k}.png" for k in range((0, 1, 2, 1, 0)[i % 5])]
        for k, name in enumerate(images):
            image = Image.new("RGB", (40 + i % 7, 36 + k), "white")
            ImageDraw.Draw(image).ellipse((4, 4, 30, 30), fill=colour)
            image.save(folder / name)
        if images:
            record["images"] = images
            prompt += "<image>" * len(images) + "what is it?"
        if i % 3 == 0:
            tone = 0.4 * np.sin(np.arange(2400 + 10 * i) * 0.03 * (1 + i % 4))
            soundfile.write(folder / f"{i}.wav", tone, 8000)
            record["audios"] = [f"{i}.wav"]
            record["text"] = "<audio> " + record["text"]
        if i % 10 == 7:
            frames = [Image.new("RGB", (32, 32), (40 * f, 0, 0)) for f in range(4)]
            frames[0].save(folder / f"{i}.webp", save_all=True, append_images=frames[1:], lossless=True)
            record["videos"] = [f"{i}.webp"]
            prompt += "<video>"
        if prompt:
            record["prompt"] = prompt
        if i % 2:
            record["id"] = f"ball-{i}"
        lines.append(json.dumps(record))
    path = folder / "samples.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def samples(tmp_path_factory) -> Path:
    """JSONL of 60 samples beside its media."""
    return write_samples(tmp_path_factory.mktemp("samples"))


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory, samples) -> str:
    path = str(tmp_path_factory.mktemp("tokenizer") / "t.model")
    train_tokenizer([str(samples)], path, 330, json_keys=["text", "prompt"], num_threads=1)
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory, samples, tokenizer_path) -> str:
    """The samples as a dataset folder."""
    output = str(tmp_path_factory.mktemp("built") / "balls")
    build_multimodal([str(samples)], output, tokenizer_path, workers=0, progress=False)
    return output


@pytest.fixture
def config(folder, tokenizer_path) -> Config:
    """Small towers, short rows, everything trained on."""
    config = changed(
        Config(),
        {
            "data.datasets": [DatasetConfig(path=folder)],
            "data.tokenizer": tokenizer_path,
            "data.seq_length": 128,
            "data.split": "80,20",
            "data.frames_per_video": 3,
            "model.vision.image_size": 28,
            "model.audio.seconds": 0.5,
            "model.decoder.vocab_size": 1024,
        },
    )
    return config
