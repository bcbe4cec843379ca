"""Samples as tools/preprocess_multimodal.py reads them, and the files that a preparation leaves."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path


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
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in samples))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes lines of text, complete or not at all."""
    write_text(path, "".join(f"{line}\n" for line in lines))


def write_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)
