"""Releases of megatron-core: which are known, and all that differs between them.

The package is written against what the known releases have in common. Where they part, a function here makes the call
that the installed one wants, and `DIFFERENCES` says what changed and when; no other file asks for the release.
Checkpoints are the same for all: each release reads what another has written.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
    from megatron.core.transformer.mlp import MLPSubmodules

#: Series of releases that this package runs on, and the release of each that its tests ran on.
KNOWN_RELEASES = {"0.16": "0.16.1", "0.19": "0.19.2"}


class Difference(NamedTuple):
    """Something that came with a release."""

    name: str
    """What is there since: a name of megatron-core, or `function(argument)`."""
    since: str
    change: str

    @property
    def is_here(self) -> bool:
        """Whether the installed release has it."""
        return _series(_release()) >= _series(self.since)


MLP_BUILDER = Difference(
    "megatron.core.transformer.mlp.MLP.as_mlp_submodule",
    "0.18",
    "layers want a function that builds their MLP; a ModuleSpec is rewrapped, with a warning for each layer",
)
CHECKPOINT_WRITER = Difference(
    "megatron.core.dist_checkpointing.strategies.torch.TorchDistSaveShardedStrategy.async_save(async_strategy)",
    "0.17",
    "megatron-core's own writer must be named: the default is that of nvidia-resiliency-ext, a package of its own",
)
COMMON_STATE = Difference(
    "megatron.core.dist_checkpointing.serialization._legacy_common_state_exists",
    "0.19",
    "save() keeps common values among the shards; `common.pt`, which training writes for 0.16 too, is still read",
)
DIFFERENCES = (MLP_BUILDER, CHECKPOINT_WRITER, COMMON_STATE)

#: What 0.19 makes every process say and nobody can act upon: of the writer that has to be named, of `common.pt`, of
#: reading shards without a process group, and of the compiler that it imports where torch was built for CUDA.
_LOGGED = {
    "megatron.core.dist_checkpointing.strategies.torch": "async save is deprecated",
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",
    "torch.utils.cpp_extension": "No CUDA runtime is found",
}
_WARNED = ("The argument order of load has been changed", "torch.distributed is disabled, unavailable or uninitialized")


def prepare() -> None:
    """Checks the installed release, and silences what it says of itself. Calling it again does no harm.

    Raises:
        ValueError: a series that nobody has tried, whose names and redirections may have changed.
    """
    release = _release()
    if _series(release) not in map(_series, KNOWN_RELEASES):
        raise ValueError(f"megatron-core {release} was not tried; install one of: {', '.join(KNOWN_RELEASES.values())}")
    for logger in _LOGGED:
        logging.getLogger(logger).addFilter(_is_worth_saying)
    for message in _WARNED:
        warnings.filterwarnings("ignore", message=message, category=UserWarning)


def mlp_part(submodules: MLPSubmodules) -> Any:
    """megatron-core's MLP, as TransformerLayerSubmodules take it."""
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.spec_utils import ModuleSpec

    if MLP_BUILDER.is_here:
        return functools.partial(MLP.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=MLP, submodules=submodules)


def begin_save(strategy: TorchDistSaveShardedStrategy, sharded: dict, folder: Path) -> Any:
    """The AsyncRequest that writes the sharded entries to a folder. Collective."""
    options = {"async_strategy": "mcore"} if CHECKPOINT_WRITER.is_here else {}
    return strategy.async_save(sharded, folder, **options)


def _release() -> str:
    return importlib.metadata.version("megatron-core")


def _series(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".")[:2])


def _is_worth_saying(record: logging.LogRecord) -> bool:
    return _LOGGED[record.name] not in record.getMessage()
