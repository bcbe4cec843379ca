"""Samples as tools/preprocess_multimodal.py reads them, and the files that a preparation leaves."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_mm.config.outputs import begin_folder
from megatron_mm.platform.atomic_files import write_whole

#: Names the packages that a preparation is made of, by which its folder is known.
LICENCES = "LICENCES.txt"


def sample(
    identifier: str,
    text: str,
    *,
    prompt: str = "",
    images: Sequence[str] = (),
    audios: Sequence[str] = (),
    videos: Sequence[str] = (),
) -> dict:
    """A line: the placeholders of its media, then the prompt, then the text to learn.

    Args:
        images, audios, videos: files, relative to the JSONL's folder.
    """
    placeholders = "<image>" * len(images) + "<audio>" * len(audios) + "<video>" * len(videos)
    media = {"images": list(images), "audios": list(audios), "videos": list(videos)}
    return {"id": identifier, "prompt": placeholders + prompt, "text": text, **media}


def write_jsonl(path: Path, samples: Iterable[dict]) -> None:
    """Writes one sample a line, complete or not at all."""
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in samples))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes lines of text, complete or not at all."""
    write_whole(path, "".join(f"{line}\n" for line in lines))


def begin_data(folder: Path, maker: str) -> None:
    """Makes the folder of a preparation, or takes up an earlier one of the same: its lists are written anew.

    Args:
        maker: module of the preparation.

    Raises:
        ValueError: the folder is another's.
    """
    begin_folder(folder, maker, "--output", _is_earlier)


def _is_earlier(folder: Path) -> bool:
    """Whether an earlier version, which left no marker, prepared a folder, or began to."""
    if {path.name for path in folder.iterdir()} <= {"packages", "images", "sounds", "clips", "stamps"}:
        return True  # there are no lists yet
    licences = folder / LICENCES
    return licences.is_file() and licences.read_text(encoding="utf-8").startswith("emoji-datasource-google ")
