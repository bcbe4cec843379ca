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

from megatron_mm.config.fields import Listed
from megatron_mm.config.plugins import load_plugin
from megatron_mm.config.schema import Config
from megatron_mm.data.reading.microbatch import ListedPlan, Microbatch, field_shapes, range_problem
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
        if [own.listed for own in plan.own_lists] != list(self.inputs.own_lists):
            return f"plan.own_lists has {_names(plan.own_lists)}; it must have {_names(self.inputs.own_lists)}"
        for own in plan.own_lists:
            if own.number < 1 or not 1 <= own.slots <= own.listed.most:
                return (
                    f"plan.own_lists: {own.number} of {own.listed.name!r} in {own.slots} slots a row; it must be at "
                    f"least 1 (a stand-in) in 1 … {own.listed.most}"
                )
        if unknown := batch.own.keys() - self.inputs.fields - self.inputs.always_read:
            return f"{', '.join(sorted(unknown))}: a field that this system does not declare (InputFormat.own_fields)"
        wanted = self.inputs.always_read.union(fields)
        for name, (shape, dtype) in field_shapes(self.inputs, plan).items():
            if name not in wanted:
                continue
            value = getattr(batch, name, None)
            if not isinstance(value, torch.Tensor):
                return f"{name} is missing; it must be {dtype} {list(shape)}"
            if tuple(value.shape) != shape or value.dtype != dtype:
                return f"{name} is {value.dtype} {list(value.shape)}; it must be {dtype} {list(shape)}"
        for field in self.inputs.declared:
            value = getattr(batch, field.name, None)
            problem = range_problem(field, value, plan) if value is not None else None
            if problem:
                return problem
        return None


def _names(lists: Sequence[Listed | ListedPlan]) -> str:
    """For messages."""
    names = [one.listed.name if isinstance(one, ListedPlan) else one.name for one in lists]
    return ", ".join(names) or "none"
