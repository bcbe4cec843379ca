"""The two implementations of layers, chosen by the settings: neither knows of the other, nor of this file."""

from __future__ import annotations

from types import ModuleType

from megatron_mm.models.layers.settings import LayerSettings


def backend_of(settings: LayerSettings) -> ModuleType:
    """The module that makes the layers of a backend: `layers.local` or `layers.transformer_engine`."""
    if settings.backend == "transformer_engine":
        from megatron_mm.models.layers import transformer_engine

        return transformer_engine
    from megatron_mm.models.layers import local

    return local
