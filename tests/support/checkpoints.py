"""What checkpoints hold."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_mm.checkpoints.reader import CheckpointReader


def plain_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole, by key."""
    reader = CheckpointReader(folder)
    return {key: reader.read(key) for key in reader.tensors}
