"""Held-out pieces of Python's standard library as samples of tools/evaluate.py: a prompt, and the text that follows.

    python -m examples.own_system.held_out --output held_out.jsonl --samples 64
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import tyro

from examples.own_system.byte_mixer import modules

PROMPT, TEXT = 64, 32  # characters


@dataclass
class Arguments:
    """How many samples, and where."""

    output: Path
    """JSONL to write."""
    samples: int = 64
    """Lines of it."""
    seed: int = 0
    """Chooses the pieces."""


def samples(count: int, seed: int) -> list[dict]:
    """Pieces of modules that no run learns."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in modules()[1])
    chance, found = random.Random(seed), []
    while len(found) < count:
        start = chance.randrange(len(text) - PROMPT - TEXT)
        end = start + PROMPT
        if text[end : end + TEXT].strip():
            found.append({"id": str(start), "prompt": text[start:end], "text": text[end : end + TEXT]})
    return found


if __name__ == "__main__":
    arguments = tyro.cli(Arguments, description=__doc__)
    lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples(arguments.samples, arguments.seed))
    arguments.output.write_text("".join(lines), encoding="utf-8")
