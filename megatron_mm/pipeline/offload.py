"""Activations of some layers in host memory, from a layer's forward pass to its backward pass.

What autograd saves of a layer (with full recomputation: its inputs) is copied to the host as it is saved and back when
it is needed, by torch's hooks for saved tensors, so any layer and any number of microbatches in flight will do.
megatron-core's own offload belongs to its transformer block and refuses pipelines. On a GPU the copy to the host runs
on a stream of its own beside computation; the copy back is waited for. Weights and small tensors stay where they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

#: Smaller tensors stay: moving them costs more than they hold.
MIN_BYTES = 1 << 20


@dataclass(frozen=True)
class _OnHost:
    values: torch.Tensor
    device: torch.device
    copied: torch.cuda.Event | None
    """When the copy is complete; None where it was waited for."""


class Offload(torch.autograd.graph.saved_tensors_hooks):
    """A context: large tensors that autograd saves within it are kept on the host.

    Args:
        module: whose parameters stay.
    """

    _stream: torch.cuda.Stream | None = None

    def __init__(self, module: nn.Module) -> None:
        self._stay = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
        self._seen: dict[tuple, tuple[torch.Tensor, _OnHost]] = {}
        self._small: dict[int, torch.UntypedStorage] = {}
        self.moved = 0
        """Bytes on the host."""
        self.stayed = 0
        """Bytes of what is too small to move."""
        super().__init__(self._pack, self._unpack)

    def __enter__(self) -> Offload:
        """Begins."""
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """Lets go of what lies on the device: until here, it kept addresses from being used again."""
        self._seen.clear()
        self._small.clear()
        super().__exit__(*error)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _OnHost:
        storage = tensor.untyped_storage()._cdata
        if storage in self._stay:
            return tensor
        if tensor.numel() * tensor.element_size() < MIN_BYTES:
            if storage not in self._small:
                self._small[storage] = tensor.untyped_storage()
                self.stayed += tensor.untyped_storage().nbytes()
            return tensor
        place = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        if place not in self._seen:  # several functions of a layer save the same tensor
            self._seen[place] = (tensor, self._to_host(tensor))
            self.moved += tensor.numel() * tensor.element_size()
        return self._seen[place][1]

    def _to_host(self, tensor: torch.Tensor) -> _OnHost:
        tensor = tensor.detach()
        if not tensor.is_cuda:  # the host itself, or meta
            return _OnHost(tensor.clone(), tensor.device, None)
        if Offload._stream is None:
            Offload._stream = torch.cuda.Stream()
        stream = Offload._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            values.copy_(tensor, non_blocking=True)
            copied = stream.record_event()
        tensor.record_stream(stream)
        return _OnHost(values, tensor.device, copied)

    @staticmethod
    def _unpack(saved: torch.Tensor | _OnHost) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        if saved.copied is not None:
            torch.cuda.current_stream().wait_event(saved.copied)
        return saved.values.to(saved.device, non_blocking=True)
