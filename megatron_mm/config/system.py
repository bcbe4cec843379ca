"""The section of a system: what `model:` of a recipe may hold, chosen by `model.system`.

Beside its fields a section offers what the rest of the program asks of a system: `inputs`, the InputFormat of its
samples; what it learns (`generates`, `contrasts`, …), by which graph, export and evaluation go;
`problems(config, sizes)`, what contradicts itself; `notes(sizes)`, what a layout cannot divide.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from megatron_mm.config.inputs import InputFormat
from megatron_mm.config.section import megatron, section


@section
class SystemConfig:
    """What every system has; a system's own section derives from it."""

    system: str
    """Name of the system."""
    backend: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer implementation: Transformer Engine on CUDA, plain torch elsewhere; auto chooses."""
    attention_backend: Annotated[
        Literal["auto", "flash", "fused", "unfused", "local"], megatron("attention-backend")
    ] = "auto"
    """Kernels that Transformer Engine takes for attention: FlashAttention, cuDNN's fused ones, its own unfused; auto:
    the fastest that there is. local is torch's attention, which model.backend local has."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    hidden_dropout: float = 0.0
    """Dropout on each sublayer's output."""
    attention_dropout: float = 0.0
    """Dropout on attention probabilities."""

    @property
    def inputs(self) -> InputFormat:
        """What samples must hold."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its samples hold")

    @property
    def reads_text(self) -> bool:
        """Whether the model reads text; a phase may not."""
        return True

    @property
    def generates(self) -> bool:
        """Whether the model learns to generate text."""
        return False

    @property
    def contrasts(self) -> bool:
        """Whether the model embeds samples of two modalities for comparison."""
        return False

    @property
    def reconstructs(self) -> bool:
        """Whether the model learns masked autoencoding."""
        return False

    def problems(self, config, sizes) -> Iterator[str]:
        """What contradicts itself, the rest of the configuration or the layout."""
        yield from ()

    def notes(self, sizes) -> Iterator[str]:
        """What this system does not divide the way a layout asks; it is repeated instead."""
        yield from ()


def whole_notes(sizes, what: str) -> Iterator[str]:
    """What to say of a part that context and sequence parallelism leave whole."""
    if sizes.cp > 1:
        yield f"context parallel {sizes.cp}: {what} is whole on each of these processes, which repeat its work"
    if sizes.sequence_parallel:
        yield f"sequence parallel: {what} is tensor parallel only, because its length divides by no size"
