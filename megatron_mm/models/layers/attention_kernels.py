"""Which kernels compute attention: what `model.attention_backend` asks for, and what a run then has.

Transformer Engine chooses among FlashAttention, cuDNN's fused attention and its own unfused one for each call, by what
three environment variables leave open. Megatron-LM's `--attention-backend` sets them; so does `request`. `describe`
says, before the first step, what every kind of attention of the model gets: it asks Transformer Engine what its calls
will ask. Attention that is torch's has its kernel as `attention_kernel`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from torch import nn

from megatron_mm.models.layers.attention import SelfAttention
from megatron_mm.models.layers.settings import LayerSettings

_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
_CHOICES = dict(zip(("flash", "fused", "unfused"), _VARIABLES))


def request(attention_backend: str) -> None:
    """Tells Transformer Engine which kernels it may take; `auto` leaves the environment as it is.

    Raises:
        ValueError: the environment says otherwise.
    """
    if attention_backend == "auto":
        return
    for name in _VARIABLES:
        wanted = str(int(_CHOICES.get(attention_backend) == name))
        if os.environ.get(name, wanted) != wanted:
            raise ValueError(
                f"model.attention_backend {attention_backend} needs {name}={wanted}, but the environment has "
                f"{name}={os.environ[name]}; unset it, or leave the choice to it with attention_backend auto"
            )
        os.environ[name] = wanted


def describe(modules: Iterable[nn.Module], settings: LayerSettings, length: int) -> list[str]:
    """Kinds of attention in `modules` and their kernels, a line each, none twice.

    Args:
        length: tokens of a row.

    Raises:
        ValueError: Transformer Engine has no kernel for any call of one of them.
    """
    modules, lines = list(modules), set[str]()
    lines.update(module.attention_kernel for module in modules if hasattr(module, "attention_kernel"))
    if settings.backend == "transformer_engine":
        from megatron_mm.models.layers import transformer_engine

        lines.update(transformer_engine.kernels(modules, length))
    if settings.sizes.cp > 1 and any(isinstance(module, SelfAttention) for module in modules):
        lines.add(f"context parallel by {_exchange(settings)}")
    return sorted(lines)


def _exchange(settings: LayerSettings) -> str:
    """How the keys of other processes are met."""
    comm = settings.cp_comm_type
    ours = "a2a" if comm == "a2a" else "all_gather"
    if settings.backend == "transformer_engine":
        return f"Transformer Engine's {comm} where a row is one document, otherwise {ours}"
    return ours if comm == ours else f"{ours} ({comm} is Transformer Engine's)"
