"""Transformer Engine's Python layers without its CUDA library: they construct, and their attention runs.

Transformer Engine's wheel on PyPI has all its Python code; the compiled module `transformer_engine_torch` gives it
enumerations at import and kernels at run time. `install()` puts a module in its place whose enumerations have any
member, and which has no kernel: what would call one fails by name. So does FlashAttention's, whose operators torch
knows by their shapes. For the pinned versions alone (run.sh), in an environment of its own.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock


class _Members(type):
    """Gives a class any member, each a number of its own."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, len(cls.__members__))
        return getattr(cls, name)

    @property
    def __members__(cls) -> dict[str, int]:
        return {name: value for name, value in vars(cls).items() if not name.startswith("__")}


class _Library(types.ModuleType):
    """The compiled module: capitalised names are enumerations or classes, all others kernels."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            value: object = _Members(name, (), {})
        else:

            def value(*_: object, **__: object) -> None:
                raise NotImplementedError(f"{self.__name__}.{name} needs CUDA")

        setattr(self, name, value)
        return value


def install() -> None:
    """To be called before anything imports Transformer Engine."""
    import torch

    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # the core library is not loaded either
    for name in ("transformer_engine_torch", "flash_attn_2_cuda"):
        sys.modules[name] = _Library(name)
    sys.modules["transformer_engine_torch"].get_cudnn_version = lambda: 92000  # asked for with the choice of a kernel
    import transformer_engine.common as common

    common.load_framework_extension = lambda framework: None
    # Its modules ask for the device and its capability while they are defined.
    torch.cuda.get_device_capability = lambda device=None: (8, 0)  # A100
    torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(
        major=8, minor=0, multi_processor_count=108, total_memory=80 << 30, name="A100"
    )


@contextlib.contextmanager
def cuda_available() -> Iterator[None]:
    """Transformer Engine's layers refuse to be made where torch finds no CUDA, and tensors of another device."""
    import torch

    before, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    torch.Tensor.is_cuda = property(lambda tensor: True)
    try:
        yield
    finally:
        del torch.Tensor.is_cuda  # that of its base class is found again
        torch.cuda.is_available = before


@contextlib.contextmanager
def only_attention() -> Iterator[None]:
    """The local backend's linears and norms in place of Transformer Engine's, whose kernels are not here.

    Its attention is Python down to FlashAttention's operators, which have shapes on meta, and flash.py's on a CPU.
    """
    from megatron_mm.models.layers import local
    from megatron_mm.models.layers import transformer_engine as engine

    names = ("layer_submodules", "norm", "NORM", "column_linear", "row_linear")
    before = {name: getattr(engine, name) for name in names}

    def layer_submodules():
        parts = local.layer_submodules()
        core = replace(parts.self_attention.submodules, core_attention=engine.CoreAttention)
        return replace(parts, self_attention=replace(parts.self_attention, submodules=core))

    for name in names:
        setattr(engine, name, getattr(local, name))
    engine.layer_submodules = layer_submodules
    asked = {"NVTE_FLASH_ATTN": "1", "NVTE_FUSED_ATTN": "0", "NVTE_UNFUSED_ATTN": "0"}
    try:
        with mock.patch.dict(os.environ, asked), cuda_available():
            yield
    finally:
        for name, value in before.items():
            setattr(engine, name, value)
