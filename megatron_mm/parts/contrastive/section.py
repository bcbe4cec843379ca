"""Settings of contrastive embeddings and their loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from megatron_mm.config.section import section


@section
class ContrastiveConfig:
    """Symmetric InfoNCE with a learned temperature (CLIP, arXiv:2103.00020)."""

    embedding_size: int = 1024
    """Width of the shared space."""
    temperature: float = 0.07
    """Initial temperature; its inverse is the logit scale."""
    max_scale: float = 100.0
    """Largest logit scale."""
    negatives: Literal["microbatch", "batch"] = "microbatch"
    """Against the micro_batch_size x data parallel samples of a microbatch, or against the whole global batch (features
    are computed once without gradient, cached, and a second pass carries the gradient)."""

    def problems(self, name: str, training, sizes) -> Iterator[str]:
        """What is wrong; the loss compares samples with one another, so one alone teaches nothing."""
        if self.temperature <= 0:
            yield f"{name}.temperature is {self.temperature}; it must be positive"
        elif self.temperature * self.max_scale < 1:
            yield (
                f"{name}.temperature is {self.temperature}: the scale would begin with {1 / self.temperature:g}, above "
                f"{name}.max_scale {self.max_scale}"
            )
        if training.global_batch_size < 2:
            yield "training.global_batch_size is 1: a contrastive loss needs at least two samples"
        elif self.negatives == "microbatch" and training.micro_batch_size * sizes.dp < 2:
            yield (
                "training.micro_batch_size 1 x data parallel 1 leaves a contrastive loss one sample a microbatch; "
                f"take more, or {name}.negatives: batch"
            )
