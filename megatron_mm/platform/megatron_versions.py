"""Releases of megatron-core: which are known, and all that differs between them.

The package is written against what the known releases have in common. Where they part, a function here makes the call
that the installed one wants, and `DIFFERENCES` says what changed and when; no other file asks for the release.
Checkpoints are the same for all: each release reads what another has written.
"""

from __future__ import annotations

import functools
import importlib.metadata
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_mm.platform import notices

if TYPE_CHECKING:
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
CUDA_GRAPHS = Difference(
    "megatron.core.transformer.transformer_config.TransformerConfig(cuda_graph_modules)",
    "0.18",
    "what CUDA graphs capture, before `cuda_graph_scope`; the default of both is a value that they call deprecated",
)
DIFFERENCES = (MLP_BUILDER, CUDA_GRAPHS)


def prepare() -> None:
    """Checks the installed release, and silences its notices (notices.py). Calling it again does no harm.

    Raises:
        ValueError: a series that nobody has tried, whose names and redirections may have changed.
    """
    release = _release()
    if _series(release) not in map(_series, KNOWN_RELEASES):
        raise ValueError(f"megatron-core {release} was not tried; install one of: {', '.join(KNOWN_RELEASES.values())}")
    notices.silence(notices.ALWAYS)


def mlp_part(submodules: MLPSubmodules) -> Any:
    """megatron-core's MLP, as TransformerLayerSubmodules take it."""
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.spec_utils import ModuleSpec

    if MLP_BUILDER.is_here:
        return functools.partial(MLP.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=MLP, submodules=submodules)


def no_cuda_graphs() -> dict[str, list]:
    """Arguments of a TransformerConfig that captures none, which is the default, without its warning."""
    return {"cuda_graph_modules" if CUDA_GRAPHS.is_here else "cuda_graph_scope": []}


def _release() -> str:
    return importlib.metadata.version("megatron-core")


def _series(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".")[:2])
