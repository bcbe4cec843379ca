"""Writing the weights of a checkpoint tensor by tensor, in one process, without a process group."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import torch

from megatron_mm.checkpoints.image import Image
from megatron_mm.checkpoints.slots import Slot
from megatron_mm.models.names import checkpoint_key


def write_checkpoint_weights(
    folder: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, make: Callable[[str], torch.Tensor]
) -> None:
    """Writes the weights of a training checkpoint.

    Args:
        folder: the checkpoint folder, which exists and is empty.
        shapes: whole shape of each training parameter.
        dtype: type to store.
        make: gives the tensor of a training parameter, called once each, in order.
    """
    by_key = {_key_among(name, shapes): name for name in shapes}
    slots = [
        Slot(key, tuple(shapes[name]), (0,) * len(shapes[name]), torch.empty(shapes[name], dtype=dtype, device="meta"))
        for key, name in by_key.items()
    ]
    Image(slots).write(folder, 0, lambda slot: make(by_key[slot.key]).to(dtype))


def _key_among(name: str, names: Collection[str]) -> str:
    """The key of a parameter of a model with parameters of these names.

    A norm is spelled as part of the linear layer that follows it only where there is one: a user's own layer may have a
    norm of the same name before anything else.
    """
    key = checkpoint_key(name)
    linear, fused, _ = key.rpartition("layer_norm_")
    return key if not fused or f"{linear}weight" in names else name
