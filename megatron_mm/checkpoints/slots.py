"""A region of a tensor of a checkpoint, and the memory that has its values or is to take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_mm.checkpoints.regions import Coordinates, Region


@dataclass(frozen=True)
class Slot:
    """A region of a tensor of a checkpoint."""

    key: str
    shape: Coordinates
    """Of the whole tensor."""
    offsets: Coordinates
    """First index of the region in it."""
    tensor: torch.Tensor
    """The region, a view: what is copied into it is copied into the model."""

    @property
    def region(self) -> Region:
        """Its place in the whole tensor."""
        return self.offsets, tuple(self.tensor.shape)
