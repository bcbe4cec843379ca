"""Loading a run: weights, optimizer state and position, in whatever layout they were written. Saving is save.py's.

Weights are entries `node.parameter`, optimizer state `optimizer.<state>.<entry>`; the manifest has the position. On
resume the newest whole checkpoint is used, and what is wrong with a newer one is said.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mm.checkpoints import folder as checkpoint_folder
from megatron_mm.checkpoints.held import Held, held
from megatron_mm.checkpoints.local import LocalSet
from megatron_mm.checkpoints.own_files import DamagedError
from megatron_mm.checkpoints.reader import CheckpointReader
from megatron_mm.checkpoints.scattered import ScatteredSource
from megatron_mm.checkpoints.slots import Slot
from megatron_mm.models.node_names import collapsed, node_and_weight
from megatron_mm.pipeline.schedule import Pipeline
from megatron_mm.platform.collectives import exchanged

if TYPE_CHECKING:
    from megatron_mm.training.optimizer import Optimizer

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class Position:
    """How far a run has come."""

    iteration: int = 0
    consumed_samples: int = 0


def weights_of(pipeline: Pipeline) -> list[Held]:
    """Weights that this process holds, without the extra state of FP8 layers, which the other backend lacks."""
    entries = pipeline.sharded_state_dict()
    return held({key: value for key, value in entries.items() if not key.endswith("_extra_state")})


def find(
    path: Path, passed_over: Mapping[Path | LocalSet, str] | None = None, local: LocalSet | None = None
) -> Path | LocalSet | None:
    """The newest whole checkpoint under a folder, or the folder itself; the same on every process. Collective.

    Damaged ones are passed over and reported.

    Args:
        path: of a checkpoint, or of a folder of them.
        passed_over: checkpoints that turned out to be damaged when they were read, and what was wrong with them.
        local: the newest set of local copies, which is taken if it is newer.

    Raises:
        ValueError: there are checkpoints and none is whole, or `path` is one and is damaged.
    """
    passed_over = passed_over or {}
    found: list = [None, [], False]
    if dist.get_rank() == 0:
        if (path / checkpoint_folder.MANIFEST).exists():
            problem = checkpoint_folder.verify(path)
            found = [None, [problem], False] if problem else [path, [], False]
        else:
            folder, problems = checkpoint_folder.newest_whole(path, passed_over)
            newer = local is not None and (folder is None or local.iteration > iteration_of(folder))
            found = [folder, problems, newer]
            for problem in problems if newer or folder is not None else ():
                logger.warning("a damaged checkpoint is passed over: %s", problem)
            if newer or (folder is not None and (problems or passed_over)):
                logger.warning("resuming from %s", local if newer else f"the one before: {folder}")
    dist.broadcast_object_list(found)
    folder, problems, newer = found
    if newer:
        return local
    if folder is None and (problems or passed_over):
        damaged = [*passed_over.values(), *problems]
        raise ValueError(f"no checkpoint is whole: {'; '.join(damaged)}; remove what is damaged to start anew")
    return folder


def iteration_of(place: Path | LocalSet) -> int:
    """Iteration of a whole checkpoint."""
    return place.iteration if isinstance(place, LocalSet) else checkpoint_folder.recorded_iteration(place)


def load(folder: Path | LocalSet, pipeline: Pipeline, optimizer: Optimizer) -> Position:
    """Restores weights, optimizer and position from a training checkpoint, whatever layout wrote it. Collective.

    Raises:
        ValueError: the checkpoint lacks weights of this model, or holds them in other shapes.
        DamagedError: a file is not what was written; weights and optimizer state are not to be used.
    """
    reader, weights = _whole_model(folder, pipeline)
    state = [slot for slot in optimizer.slots(weights) if slot.key in reader]
    read_together(reader, [*(slot for weight in weights for slot in weight.slots()), *state])
    common = reader.common
    steps, samples = common.get("optimizer_step", 0), common.get("consumed_samples", 0)
    optimizer.restore(weights, reader.shapes, steps, samples)
    return Position(common["iteration"], samples)


def load_weights(folder: Path, pipeline: Pipeline) -> None:
    """Restores the weights alone, of a model that will not train; raises as `load`. Collective."""
    reader, weights = _whole_model(folder, pipeline)
    read_together(reader, [slot for weight in weights for slot in weight.slots()])


def read_together(reader: CheckpointReader, slots: Iterable[Slot]) -> None:
    """Fills what this process needs from a checkpoint, and raises DamagedError on all if any cannot. Collective."""
    wanted = _together(lambda: reader.wanted(slots))  # before any reads: what others wait for comes then
    _together(lambda: reader.read_wanted(wanted))


def opened(folder: Path | LocalSet) -> CheckpointReader:
    """A checkpoint's reader, or DamagedError on every process where any cannot open it. Collective."""
    return _together(lambda: CheckpointReader(ScatteredSource(folder) if isinstance(folder, LocalSet) else folder))


def _together(act: Callable[[], T]) -> T:
    """What something returns, or DamagedError on every process where it fails on any. Collective."""
    problem = result = None
    try:
        result = act()
    except (ValueError, OSError) as error:
        problem = str(error)
    found = next(filter(None, exchanged(problem)), None)
    if found:
        raise DamagedError(found)
    return cast(T, result)


def _whole_model(folder: Path | LocalSet, pipeline: Pipeline) -> tuple[CheckpointReader, list[Held]]:
    """A checkpoint, and this process's weights, all of which it holds in their shapes."""
    reader, weights = opened(folder), weights_of(pipeline)
    missing = sorted(weight.key for weight in weights if weight.key not in reader.tensors)
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} weights of this model, such as {missing[0]}")
    check_shapes(reader.folder, weights, reader.shapes)
    return reader, weights


def check_shapes(folder: Path, weights: Sequence[Held], stored: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError where weights are stored in other shapes, with a line for each node of all stages. Collective.

    Args:
        weights: all of which the checkpoint holds.
        stored: shapes of what it holds.
    """
    own = []
    for weight in weights:
        slot = next(weight.slots())
        if slot.shape != stored[weight.key]:
            own.append((weight.key, stored[weight.key], slot.shape))
    group = parallel_state.get_pipeline_model_parallel_group()
    everyone: list = [None] * group.size()
    dist.all_gather_object(everyone, own, group=group)
    lines = _size_lines(dict.fromkeys(wrong for stage in everyone for wrong in stage))
    if lines:
        raise ValueError("\n  ".join([f"{folder} is of a model of other sizes:", *lines]))


def _size_lines(wrong: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> list[str]:
    """A line for each node, nodes that differ in their number and nothing else together: its first weight, and how many
    others."""
    nodes: dict[str, list[tuple]] = {}
    for key, there, here in wrong:
        node, weight = node_and_weight(key)
        nodes.setdefault(node, []).append((weight, there, here))
    alike: dict[tuple, list[str]] = {}
    for node, weights in nodes.items():
        alike.setdefault(tuple(weights), []).append(node)
    lines = []
    for ((weight, there, here), *others), names in alike.items():
        rest = f"; {len(others)} more of its weights differ" if others else ""
        lines += [f"{name}.{weight} is {there} where this model needs {here}{rest}" for name in collapsed(names)]
    return lines
