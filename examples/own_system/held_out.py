"""Held-out paragraphs of Python's standard library as samples of tools/evaluate.py: a beginning, and how it goes on.

    python -m examples.own_system.held_out --output held_out.jsonl --samples 64
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import tyro

from examples.own_system.byte_mixer import modules, paragraphs

SHORTEST, LONGEST = 48, 96  # characters


@dataclass
class Arguments:
    """How many samples, and where."""

    output: Path
    """JSONL to write."""
    samples: int = 64
    """Lines of it; fewer where there are not so many paragraphs."""
    seed: int = 0
    """Chooses the paragraphs."""


def samples(count: int, seed: int) -> list[dict]:
    """Paragraphs of modules that no run learns: two thirds are the prompt."""
    found = [part for part in paragraphs(modules()[1]) if SHORTEST <= len(part) <= LONGEST]
    random.Random(seed).shuffle(found)
    cuts = [(part, len(part) * 2 // 3) for part in found[:count]]
    return [{"id": str(i), "prompt": part[:cut], "text": part[cut:]} for i, (part, cut) in enumerate(cuts)]


if __name__ == "__main__":
    arguments = tyro.cli(Arguments, description=__doc__)
    lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples(arguments.samples, arguments.seed))
    arguments.output.write_text("".join(lines), encoding="utf-8")
