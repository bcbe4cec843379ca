"""The datasets of a run under faults (`data.builder`): they leave marks of where the run is, and give NaN on demand.

The folder that FAULTS_MARKS names holds `opened` and `validated`, a byte longer each time a process opens the data and
each time it reads a microbatch of validation. If it holds `nan` with the number of a sample, pixels and sounds of that
sample and of all after it are NaN.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from megatron_mm.data.reading.dataset import Split, build_datasets
from megatron_mm.data.reading.microbatch import Microbatch

MARKS = "FAULTS_MARKS"


def _mark(name: str) -> None:
    if MARKS in os.environ:
        with Path(os.environ[MARKS], name).open("ab") as stream:
            stream.write(b".")


def _first_nan() -> float:
    """Number of the first sample that is NaN."""
    try:
        return int(Path(os.environ[MARKS], "nan").read_text())
    except (KeyError, OSError, ValueError):
        return float("inf")


class _Watched:
    """A split that says when it is read."""

    def __init__(self, split: Split, name: str) -> None:
        self.split, self.name = split, name
        self.report_lines = split.report_lines

    def microbatch(self, index: Sequence[int], fields: Collection[str], task: str = "") -> Microbatch:
        """The split's microbatch, or one of NaN."""
        if self.name == "valid":
            _mark("validated")
        batch = self.split.microbatch(index, fields, task)
        if self.name == "train" and max(index) >= _first_nan():
            broken = {name: torch.full_like(value, float("nan")) for name, value in batch.tensors.items()
                      if value.is_floating_point()}  # fmt: skip
            batch = batch.with_fields({**batch.tensors, **broken})
        return batch


def build(config) -> SimpleNamespace:
    """The splits of a run."""
    _mark("opened")
    made = build_datasets(replace(config, data=replace(config.data, builder=None)))
    return SimpleNamespace(
        train=_Watched(made.train, "train"), valid=_Watched(made.valid, "valid"), test=None, tokenizer=made.tokenizer
    )
