"""The streams alive at a pipeline cut, packed into the one tensor that megatron-core's schedules carry.

A payload is `[S, 1, H]` in the precision of the layers; streams lie in it one after another, flattened, each on a
64-element boundary. A stream of a wider dtype (fp32 in a bf16 payload) travels as raw bytes, so it is exact; so does
its gradient on the way back, in a payload of the same form. Streams that no trainable parameter reaches are detached on
arrival. An *anchor*, an empty tensor that goes through packing and unpacking, keeps every cut connected in the autograd
graph, because the schedules need a gradient for every payload they received.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import Graph

_ALIGNMENT = 64
#: H of every payload: streams lie in it flattened, so it is no width of a model.
PAYLOAD_WIDTH = 1024


@dataclass(frozen=True)
class Slot:
    """Where one stream lies in a payload."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    length: int
    """Elements of the payload's dtype."""
    carries_gradient: bool

    def read(self, flat: torch.Tensor) -> torch.Tensor:
        """The stream, as a view of a flat payload."""
        return flat.narrow(0, self.offset, self.length).view(self.dtype).view(self.shape)

    def write(self, flat: torch.Tensor, value: torch.Tensor) -> None:
        """Copies the stream, or its gradient, into a flat payload."""
        flat.narrow(0, self.offset, self.length).copy_(value.contiguous().view(-1).view(flat.dtype))


@dataclass(frozen=True)
class PayloadLayout:
    """Slots of one cut for one microbatch."""

    slots: tuple[Slot, ...]
    elements: int


def payload_layout(
    graph: Graph, cut: int, plan: MicrobatchPlan, sizes: ParallelSizes, dtype: torch.dtype
) -> PayloadLayout:
    """Slots of the streams that cross the cut before node `cut`.

    Args:
        dtype: the payload's dtype.
    """
    slots, offset = [], 0
    for stream in graph.live(cut):
        shape = stream.local_shape(plan, sizes)
        stream_dtype = stream.dtype or dtype
        length = prod(shape) * stream_dtype.itemsize // dtype.itemsize
        gradient = graph.carries_gradient[cut, stream.name]
        slots.append(Slot(stream.name, shape, stream_dtype, offset, length, gradient))
        offset += -(-length // _ALIGNMENT) * _ALIGNMENT
    return PayloadLayout(tuple(slots), offset)


def payload_rows(layouts: Sequence[PayloadLayout]) -> int:
    """S, the rows that hold the largest of the cuts; at least 1."""
    return max(1, -(-max((layout.elements for layout in layouts), default=0) // PAYLOAD_WIDTH))


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, layout, rows, dtype, *tensors):
        ctx.layout = layout
        payload = torch.zeros(rows, 1, PAYLOAD_WIDTH, dtype=dtype, device=anchor.device)
        flat = payload.view(-1)
        for slot, tensor in zip(layout.slots, tensors):
            slot.write(flat, tensor)
        return payload

    @staticmethod
    def backward(ctx, gradient):
        flat = gradient.reshape(-1)
        gradients = [slot.read(flat) if slot.carries_gradient else None for slot in ctx.layout.slots]
        return gradient.new_zeros(0, dtype=torch.float32), None, None, None, *gradients


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, payload, layout):
        ctx.layout, ctx.shape, ctx.dtype = layout, payload.shape, payload.dtype
        ctx.set_materialize_grads(False)
        flat = payload.view(-1)
        streams = [slot.read(flat) for slot in layout.slots]
        ctx.mark_non_differentiable(*(s for s, slot in zip(streams, layout.slots) if not slot.carries_gradient))
        return payload.new_zeros(0, dtype=torch.float32), *streams

    @staticmethod
    def backward(ctx, anchor, *gradients):
        device = anchor.device if anchor is not None else next(g.device for g in gradients if g is not None)
        payload = torch.zeros(ctx.shape, dtype=ctx.dtype, device=device)
        flat = payload.view(-1)
        for slot, gradient in zip(ctx.layout.slots, gradients):
            if gradient is not None and slot.carries_gradient:
                slot.write(flat, gradient)
        return payload, None


def new_anchor(device: torch.device) -> torch.Tensor:
    """The anchor of a chunk that receives no payload."""
    return torch.zeros(0, dtype=torch.float32, device=device, requires_grad=True)


def pack(
    anchor: torch.Tensor,
    layout: PayloadLayout,
    rows: int,
    dtype: torch.dtype,
    streams: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Payload [rows, 1, PAYLOAD_WIDTH] of the streams that a layout names.

    Raises:
        ValueError: a stream has another shape or dtype than its node declared.
    """
    for slot in layout.slots:
        value = streams[slot.name]
        if tuple(value.shape) != slot.shape or value.dtype != slot.dtype:
            raise ValueError(
                f"stream {slot.name} is {tuple(value.shape)} {value.dtype} where {slot.shape} {slot.dtype} was declared"
            )
    return _Pack.apply(anchor, layout, rows, dtype, *(streams[slot.name] for slot in layout.slots))


def unpack(payload: torch.Tensor, layout: PayloadLayout) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Anchor and streams of a received payload."""
    anchor, *streams = _Unpack.apply(payload, layout)
    return anchor, {slot.name: stream for slot, stream in zip(layout.slots, streams)}
