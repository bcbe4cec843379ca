"""megatron-core without CUDA: the one place that redirects anything of torch or megatron-core.

megatron-core allocates on the current CUDA device, keeps CUDA random states, compares tensor types with CUDA strings
and synchronises streams. `apply()` points these at the CPU (or at the meta device, for the dry run). It is called once
at start-up, and only where CUDA is absent; on a CUDA machine nothing here runs. `REDIRECTIONS` lists what is redirected
and why. A megatron-core release that was not tried (megatron_versions.py) is refused, and so is a name that is gone,
because a redirection that silently misses is worse than a message.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_mm.platform import megatron_versions, notices

#: What is redirected, and why. A name without dots belongs to the owner of the one before it.
REDIRECTIONS: dict[str, str] = {
    "torch.cuda.current_device": "megatron-core allocates communication buffers there",
    "torch.cuda.synchronize, empty_cache, set_device, reset_peak_memory_stats": "nothing to do on a CPU",
    "torch.cuda.Stream, Event, stream, current_stream, default_stream": "inert: one queue only",
    "torch.cuda.manual_seed, get_rng_state, set_rng_state": "dropout draws from the CPU generator",
    "torch.empty, zeros, ones, full, tensor, arange": "device='cuda' is written out in schedules and optimizer",
    "torch.empty_like, zeros_like, ones_like, full_like": "the same",
    "torch.Tensor.cuda, torch.nn.Module.cuda": "return the object itself",
    "torch.Tensor.type": "the optimizer and clipping compare it with 'torch.cuda.FloatTensor'",
    "megatron.core.tensor_parallel.random._get_cuda_rng_state, _set_cuda_rng_state": "recomputation's CPU generator",
    "torch.compiler.set_stance": "compiling megatron-core's small fused functions costs minutes and gains nothing here",
    "megatron.core.pipeline_parallel.p2p_communication._p2p_ops": "gloo matches by order and reads what is sent late",
}

_FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange")
_FACTORIES += ("empty_like", "zeros_like", "ones_like", "full_like")
_device: torch.device | None = None


def is_applied() -> bool:
    """Whether this process runs on the redirected platform."""
    return _device is not None


def device() -> torch.device:
    """Where megatron-core allocates on this platform."""
    assert _device is not None, "the CPU platform is not applied"
    return _device


def set_device(target: str) -> None:
    """Moves new allocations to `cpu` or `meta` (the dry run)."""
    global _device
    _device = torch.device(target)


def apply() -> None:
    """Redirects torch and megatron-core to the CPU. A second call does nothing.

    Raises:
        ValueError: a megatron-core release that was not tried, or that lacks a name to redirect.
    """
    if is_applied():
        return
    megatron_versions.prepare()
    notices.silence(notices.WITHOUT_CUDA)
    set_device("cpu")
    _redirect_torch()
    _redirect_megatron()
    torch.compiler.set_stance("force_eager")


class _Inert:
    """A stream or an event: accepts every call and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _returning(value: Any) -> Callable[..., Any]:
    """A function of its own for each name: torch.compile refuses one object under two of its names."""
    return lambda *args, **kwargs: value


def _names_cuda(target: Any) -> bool:
    if isinstance(target, bool) or target is None:
        return False
    return isinstance(target, int) or str(target).startswith("cuda")


def _on_platform(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs["device"] = _device
        return factory(*args, **kwargs)

    return make


def _replace(owner: Any, **attributes: Any) -> None:
    for name, value in attributes.items():
        if not hasattr(owner, name):
            raise ValueError(f"the CPU platform redirects {owner.__name__}.{name}, which this release has not")
        setattr(owner, name, value)


def _redirect_torch() -> None:
    with torch.device("meta"):  # at its first use it notes the functions that make tensors: torch's own, not ours
        torch.empty(0)
    _replace(
        torch.cuda,
        current_device=device,
        stream=_returning(contextlib.nullcontext()),
        manual_seed=torch.default_generator.manual_seed,
        get_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
        set_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
        **{name: _returning(None) for name in ("synchronize", "empty_cache", "set_device", "reset_peak_memory_stats")},
        **{name: type(name, (_Inert,), {}) for name in ("Stream", "Event")},
        **{name: _returning(_Inert()) for name in ("current_stream", "default_stream")},
    )
    _replace(torch, **{name: _on_platform(getattr(torch, name)) for name in _FACTORIES})
    plain_type = torch.Tensor.type

    def type_like_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return plain_type(self, *args, **kwargs)
        return plain_type(self).replace("torch.", "torch.cuda.", 1).replace("cuda.cuda.", "cuda.")

    _replace(torch.Tensor, cuda=lambda self, *args, **kwargs: self, type=type_like_cuda)
    _replace(torch.nn.Module, cuda=lambda self, *args, **kwargs: self)


def _redirect_megatron() -> None:
    from megatron.core.pipeline_parallel import p2p_communication
    from megatron.core.tensor_parallel import random

    _replace(
        random,
        _get_cuda_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
        _set_cuda_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
    )
    _replace(p2p_communication, _p2p_ops=_tagged_p2p_ops)


def _tagged_p2p_ops(
    *,
    tensor_send_prev: torch.Tensor | None,
    tensor_recv_prev: torch.Tensor | None,
    tensor_send_next: torch.Tensor | None,
    tensor_recv_next: torch.Tensor | None,
    group: torch.distributed.ProcessGroup,
    prev_pipeline_rank: int,
    next_pipeline_rank: int,
) -> dict[str, torch.distributed.Work]:
    """Point-to-point of the schedules with one tag for activations and one for gradients.

    With two stages and an interleaved schedule, the previous and the next stage are the same process, and gloo would
    match an activation with a gradient. The schedule that overlaps communication takes an output's memory away before
    it was sent, which NCCL's allocator survives and gloo does not: what is sent here is an alias that keeps the memory.
    """
    activations, gradients = 1, 2
    sent_next, sent_prev = (None if t is None else t.detach() for t in (tensor_send_next, tensor_send_prev))
    wanted = {
        "send_next": (torch.distributed.isend, sent_next, next_pipeline_rank, activations),
        "recv_prev": (torch.distributed.irecv, tensor_recv_prev, prev_pipeline_rank, activations),
        "send_prev": (torch.distributed.isend, sent_prev, prev_pipeline_rank, gradients),
        "recv_next": (torch.distributed.irecv, tensor_recv_next, next_pipeline_rank, gradients),
    }
    return {
        name: start(tensor, peer, group=group, tag=tag)
        for name, (start, tensor, peer, tag) in wanted.items()
        if tensor is not None
    }
