"""Collectives: agreement of all, and torch's of one tensor by the names of 2.13, which calls older ones deprecated."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed

all_gather_single = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
reduce_scatter_single = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor


def all_agree(value: bool) -> bool:
    """Whether all processes say yes. Collective."""
    flag = torch.tensor([float(value)], device=communication_device())
    distributed.all_reduce(flag, op=distributed.ReduceOp.MIN)
    return bool(flag.item())


def exchanged(value: Any, group: distributed.ProcessGroup | None = None) -> list:
    """A value of every process, in the order of their ranks. Collective."""
    everyone: list = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(everyone, value, group=group)
    return everyone


def communication_device() -> torch.device:
    """Where the tensors of a collective over all processes lie."""
    return torch.device("cuda") if distributed.get_backend() == "nccl" else torch.device("cpu")
