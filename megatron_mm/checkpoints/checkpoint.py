"""Saving and loading a run: weights, optimizer state and position, in entries that no layout changes.

megatron-core's dist_checkpointing writes and reads the shards. Weights are entries `node.parameter`, optimizer state
`optimizer.<state>.<entry>`; iteration and consumed samples are common. A checkpoint appears whole or not at all
(folder.py); on resume the newest whole one is used, and what is wrong with a newer one is said.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mm.checkpoints import folder as checkpoint_folder
from megatron_mm.config.load import dump_config
from megatron_mm.config.schema import Config
from megatron_mm.data.tokens.tokenizer import stored_name
from megatron_mm.models.node_names import collapsed, node_and_weight
from megatron_mm.pipeline.schedule import Pipeline
from megatron_mm.platform import megatron_versions

if TYPE_CHECKING:
    from megatron_mm.training.optimizer import Optimizer

logger = logging.getLogger(__name__)


@dataclass
class Position:
    """How far a run has come."""

    iteration: int = 0
    consumed_samples: int = 0


class SaveError(OSError):
    """A checkpoint could not be written; earlier ones are untouched."""


def weights_of(pipeline: Pipeline) -> dict:
    """Weight entries without the extra state of FP8 layers, which the other backend lacks."""
    return {key: value for key, value in pipeline.sharded_state_dict().items() if not key.endswith("_extra_state")}


def save(config: Config, root: Path, pipeline: Pipeline, optimizer: Optimizer, position: Position) -> Path:
    """Writes the checkpoint of a position.

    Raises:
        SaveError: the disk is too full or writing failed; no earlier checkpoint was touched.
    """
    weights = weights_of(pipeline)
    state = {
        **weights,
        **optimizer.sharded_state(weights, loading=False),
        "iteration": position.iteration,
        "consumed_samples": position.consumed_samples,
        "optimizer_step": optimizer.steps,
    }
    part = checkpoint_folder.folder_of(root, position.iteration).with_suffix(".part")
    _together(part, lambda: checkpoint_folder.begin(root, position.iteration), first_rank_only=True)
    _raise_together(_lacks_space(state, root), part)
    sharded, common = save_preprocess(state, validate_access_integrity=False)
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1)

    def finish() -> None:
        torch.save(common, part / COMMON_STATE_FNAME)
        save_config(CheckpointingConfig(strategy.backend, strategy.version), str(part))
        dump_config(config, part / "config.yaml")
        if config.data.tokenizer:
            shutil.copyfile(config.data.tokenizer, part / stored_name(config.data.tokenizer))
        checkpoint_folder.finish(part, {"iteration": position.iteration})
        checkpoint_folder.prune(root, config.checkpoint.keep_last, position.iteration)

    _together(part, lambda: _write_shards(strategy, sharded, part))
    _together(part, finish, first_rank_only=True)
    return part.with_suffix("")


def _write_shards(strategy: TorchDistSaveShardedStrategy, sharded: dict, part: Path) -> None:
    """Every process writes its shards, then rank 0 `.metadata`. Collective.

    It is dist_checkpointing.save without the small files, because that leaves the other processes waiting where rank 0
    alone fails.
    """
    request = megatron_versions.begin_save(strategy, sharded, part)
    shards_written: list[bool] = []
    request.finalize_fns.insert(0, lambda: shards_written.append(True))
    try:
        request.execute_sync()
    except OSError:
        if shards_written:  # `.metadata` failed: the others wait for rank 0 to say whether the shards did
            dist.broadcast(torch.ones(1, dtype=torch.int, device=torch.cuda.current_device()), src=0)
        raise


def _together(part: Path, write: Callable[[], object], first_rank_only: bool = False) -> None:
    """Writes something, and raises SaveError on every process if that fails on any. Collective."""
    problem = None
    if dist.get_rank() == 0 or not first_rank_only:
        try:
            write()
        except (Exception, CheckpointException) as error:  # whatever storage does, the run goes on and says so
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            problem = f"{type(error).__name__}: {lines[-1] if lines else ''}"
    _raise_together(problem, part)


def _lacks_space(state: dict, root: Path) -> str | None:
    """Why this machine's disk will not hold what its processes are about to write."""
    own = sum(
        value.data.numel() * value.data.element_size()
        for value in nested_values(state)
        if isinstance(value, ShardedTensor | ShardedTensorFactory) and not any(_replica(value))
    )
    needed = torch.tensor(float(own), dtype=torch.float64)
    if dist.get_backend() == "gloo":  # one machine's processes share a disk; NCCL runs write to shared storage
        dist.all_reduce(needed)
    free = shutil.disk_usage(root).free
    if float(needed) * 1.05 > free:
        return f"{root} has {free / 2**20:.0f} MiB free and the checkpoint needs {float(needed) / 2**20:.0f} MiB"
    return None


def _replica(value) -> tuple:
    replica = value.replica_id
    return replica if isinstance(replica, tuple) else (replica,)


def _raise_together(problem: str | None, part: Path) -> None:
    """Raises SaveError on every process if any has a problem."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    found = next((item for item in problems if item), None)
    if found:
        if dist.get_rank() == 0:
            with contextlib.suppress(ValueError):  # which is what was found, or is found by the next save
                checkpoint_folder.remove(part)
        raise SaveError(f"checkpoint {part.with_suffix('')} was not written: {found}")


def find(path: Path) -> Path | None:
    """The newest whole checkpoint under a folder, or the folder itself; the same on every process.

    Damaged ones are passed over and reported.

    Raises:
        ValueError: there are checkpoints and none is whole, or `path` is one and is damaged.
    """
    found: list = [None, []]
    if dist.get_rank() == 0:
        if (path / checkpoint_folder.MANIFEST).exists():
            problem = checkpoint_folder.verify(path)
            found = [None, [problem]] if problem else [path, []]
        else:
            found = list(checkpoint_folder.newest_whole(path))
            for problem in found[1] if found[0] is not None else ():
                logger.warning("a damaged checkpoint is passed over: %s", problem)
            if found[0] is not None and found[1]:
                logger.warning("resuming from the one before: %s", found[0])
    dist.broadcast_object_list(found)
    folder, problems = found
    if folder is None and problems:
        raise ValueError(f"no checkpoint is whole: {'; '.join(problems)}; remove what is damaged to start anew")
    return folder


def load(folder: Path, pipeline: Pipeline, optimizer: Optimizer) -> Position:
    """Restores weights, optimizer and position from a training checkpoint, whatever layout wrote it.

    Raises:
        ValueError: the checkpoint lacks weights of this model, or holds them in other shapes.
    """
    weights, stored = _whole_model(folder, pipeline)
    wanted = optimizer.sharded_state(weights, loading=True)
    wanted = {key: entry for key, entry in wanted.items() if entry.key in stored}
    loaded = load_entries(folder, {**weights, **wanted})
    take_weights(pipeline, loaded)
    optimizer.reload_weights()
    optimizer.restore(weights_of(pipeline), loaded, loaded["optimizer_step"], loaded["consumed_samples"])
    return Position(loaded["iteration"], loaded["consumed_samples"])


def load_weights(folder: Path, pipeline: Pipeline) -> None:
    """Restores the weights alone, of a model that will not train; raises as `load`."""
    weights, _ = _whole_model(folder, pipeline)
    take_weights(pipeline, load_entries(folder, weights))


def _whole_model(folder: Path, pipeline: Pipeline) -> tuple[dict, dict[str, tuple[int, ...]]]:
    """The entries of this process's weights, all of which the checkpoint holds, and the shapes of what it holds."""
    stored, weights = stored_shapes(folder), weights_of(pipeline)
    missing = sorted(entry.key for entry in weights.values() if entry.key not in stored)
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} weights of this model, such as {missing[0]}")
    check_shapes(folder, weights, stored)
    return weights, stored


def load_entries(folder: Path, entries: dict) -> dict:
    """Reads entries into plain tensors, with the checkpoint's common values. Collective."""
    return dist_checkpointing.load(entries, str(folder), strict=StrictHandling.ASSUME_OK_UNEXPECTED)


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Whole shape of every tensor of a checkpoint, by key."""
    metadata = dist_checkpointing.load_tensors_metadata(str(folder))
    return {key: tuple(tensor.global_shape) for key, tensor in metadata.items()}


def check_shapes(folder: Path, weights: dict, stored: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError where weights are stored in other shapes, with a line for each node of all stages. Collective.

    Args:
        weights: entries, all of which the checkpoint holds.
        stored: from `stored_shapes`.
    """
    own = []
    for entry in weights.values():
        pieces = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]  # SwiGLU's two halves
        piece = next((piece for piece in nested_values(pieces) if isinstance(piece, ShardedTensor)), None)
        if piece is not None and tuple(piece.global_shape) != stored[entry.key]:
            own.append((entry.key, stored[entry.key], tuple(piece.global_shape)))
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


@torch.no_grad()
def take_weights(pipeline: Pipeline, loaded: dict) -> None:
    """Copies loaded tensors into the parameters whose names they have."""
    for chunk in pipeline.bare_chunks:
        for node, module in zip(chunk.nodes, chunk.node_modules):
            for name, parameter in module.named_parameters():
                value = loaded.get(f"{node.name}.{name}")
                if value is not None:
                    parameter.copy_(value)
