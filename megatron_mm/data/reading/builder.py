"""Datasets of a user's own (`data.builder`): loaded by name, checked, and read like any other.

What a builder must return is said in data/reading/dataset.py. Every microbatch that it makes is compared with what the
system's format demands, because a wrong shape or an index out of range would otherwise surface deep inside the model,
or not at all.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_mm.config.plugins import load_plugin
from megatron_mm.config.schema import Config
from megatron_mm.data.reading.microbatch import ALWAYS_READ, Microbatch, field_shapes
from megatron_mm.media.errors import DataError


def call_builder(config: Config) -> Any:
    """What the function that `data.builder` names returns for a configuration.

    Raises:
        ValueError: there is no such module, file or function.
    """
    module_name, _, function_name = config.data.builder.rpartition(":")
    module = load_plugin(module_name, Path.cwd(), "data.builder")
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"data.builder: {module_name} has no function {function_name}")
    return function(config)


class CheckedSplit:
    """A split of a user's own, whose microbatches are checked.

    Args:
        split: "train", "valid" or "test".
        own: the user's object.
        config: with the system's format and the length of rows.

    Raises:
        ValueError: it cannot be read from.
    """

    def __init__(self, split: str, own: Any, config: Config) -> None:
        if not callable(getattr(own, "microbatch", None)):
            raise ValueError(
                f"data.builder: {config.data.builder} gives a {type(own).__name__} as {split}; it needs a method "
                "microbatch(index, fields, task) (see data/reading/dataset.py)"
            )
        self.split, self.own, self.builder = split, own, config.data.builder
        self.inputs, self.seq_length = config.model.inputs, config.data.seq_length
        self.clip_frames = config.data.frames_per_video if self.inputs.video == "clips" else 0

    def report_lines(self) -> list[str]:
        """The user's lines, or where the samples come from."""
        lines = getattr(self.own, "report_lines", None)
        return list(lines()) if callable(lines) else [f"{self.split}: samples of {self.builder}"]

    def microbatch(self, index: Sequence[int], fields: Collection[str], task: str = "") -> Microbatch:
        """The user's microbatch.

        Raises:
            DataError: it does not fit the system; field, what it is and what it must be are named.
        """
        batch = self.own.microbatch(index, fields, task)
        problem = self._problem(batch, index, fields, task)
        if problem:
            raise DataError(f"data.builder: {self.builder}, {self.split} samples {index[0]} … {index[-1]}: {problem}")
        return batch

    def _problem(self, batch: Any, index: Sequence[int], fields: Collection[str], task: str) -> str | None:
        """What is wrong with a microbatch, or None."""
        if not isinstance(batch, Microbatch):
            return f"a {type(batch).__name__}, not a Microbatch"
        plan = batch.plan
        demanded = {"num_rows": len(index), "row_length": self.seq_length, "task": task}
        demanded["clip_frames"] = self.clip_frames
        for name, value in demanded.items():
            if getattr(plan, name) != value:
                return f"plan.{name} is {getattr(plan, name)!r}; it must be {value!r}"
        if min(plan.num_images, plan.num_sounds, plan.image_slots, plan.sound_slots) < 1:
            return "plan.num_images, num_sounds, image_slots and sound_slots must be at least 1 (stand-ins of zeros)"
        if not self.inputs.packed and (plan.image_slots, plan.sound_slots) != (1, 1):
            return "plan.image_slots and plan.sound_slots must be 1: this system reads one document a row"
        for name, (shape, dtype) in field_shapes(self.inputs, plan).items():
            value = getattr(batch, name)
            if name not in ALWAYS_READ and name not in fields:
                continue
            if not isinstance(value, torch.Tensor):
                return f"{name} is missing; it must be {dtype} {list(shape)}"
            if tuple(value.shape) != shape or value.dtype != dtype:
                return f"{name} is {value.dtype} {list(value.shape)}; it must be {dtype} {list(shape)}"
        bounds = {
            "tokens_RT": (0, self.inputs.vocab_size),
            "labels_RT": (0, self.inputs.vocab_size),
            "masked_tokens_RT": (0, self.inputs.vocab_size),
            "masked_labels_RT": (0, self.inputs.vocab_size),
            "position_ids_RT": (0, plan.row_length),
            "document_ids_RT": (-1, plan.max_documents_per_row or plan.row_length),
            "image_slots_RK": (-1, plan.num_images),
            "sound_slots_RJ": (-1, plan.num_sounds),
            "clip_slots_R": (-1, plan.num_clips),
        }
        for name, (low, high) in bounds.items():
            value = getattr(batch, name)
            if value is not None and value.numel() and not low <= int(value.min()) <= int(value.max()) < high:
                return f"{name} holds {int(value.min())} … {int(value.max())}; it must lie within {low} … {high - 1}"
        return None
