"""Questions about pictures of one coloured shape: easy-vqa from PyPI, with its own division into training and test."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

from examples.data import packages
from examples.data.packages import Package
from examples.data.samples import sample

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")

PACKAGE = Package("pip", "easy-vqa", "1.0", r"easy_vqa/data/.*\.(json|png)", "easy-VQA by Victor Zhou, MIT")


def fetch(folder: Path) -> Path:
    """The package's data, downloaded unless it is there already."""
    return packages.fetch(PACKAGE, folder / "easy-vqa") / "easy_vqa" / "data"


def question_samples(data: Path, split: str, output: Path, count: int = 0, seed: int = 0) -> list[dict]:
    """Questions as prompts, answers as texts.

    Args:
        data: `fetch`'s.
        split: "train" or "test"; no picture is in both.
        output: folder to which the pictures' paths are relative.
        count: at most this many, a fixed pseudo-random choice; 0 takes all.
        seed: of the choice.
    """
    questions = json.loads((data / split / "questions.json").read_text(encoding="utf-8"))
    numbers = list(range(len(questions)))
    random.Random(seed).shuffle(numbers)
    pictures = os.path.relpath(data / split / "images", output)
    return [
        sample(f"vqa/{split}/{n}", answer, prompt=question, images=[f"{pictures}/{picture}.png"])
        for n in numbers[: count or None]
        for question, answer, picture in [questions[n]]
    ]


def caption_samples(data: Path, split: str, output: Path, count: int = 0, seed: int = 0) -> list[dict]:
    """Pictures with a caption, such as "blue rectangle", put together from the answers about each.

    Args:
        data, split, output, seed: as for `question_samples`.
        count: at most this many pictures, a fixed pseudo-random choice; 0 takes all whose shape and colour are told.
    """
    colours, shapes = {}, {}
    for _, answer, picture in json.loads((data / split / "questions.json").read_text(encoding="utf-8")):
        if answer in COLOURS:
            colours[picture] = answer
        elif answer in SHAPES:
            shapes[picture] = answer
    known = sorted(colours.keys() & shapes.keys())
    random.Random(seed).shuffle(known)
    pictures = os.path.relpath(data / split / "images", output)
    return [
        sample(f"shape/{split}/{number}", f"{colours[number]} {shapes[number]}", images=[f"{pictures}/{number}.png"])
        for number in known[: count or None]
    ]
