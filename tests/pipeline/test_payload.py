"""What crosses a cut arrives bit for bit, and so do gradients."""

import pytest
import torch
from torch import nn

from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import Graph, Kind, Node, NodeCost, Stream
from megatron_mm.pipeline.payload import PAYLOAD_WIDTH, new_anchor, pack, payload_layout, payload_rows, unpack

PLAN = MicrobatchPlan(2, 8, 1, 1, 1, 1, False, 8)


def graph() -> Graph:
    frozen = Stream("frozen", lambda plan: (5, 3))
    exact = Stream("exact", lambda plan: (7,), dtype=torch.float32)
    text = Stream("text", lambda plan: (4, 1, 6))

    def node(name, reads, writes, trainable=True):
        return Node(name, Kind(nn.Identity, lambda plan: NodeCost(0)), reads, writes, trainable=trainable)

    nodes = [
        node("tower", (), (frozen,), trainable=False),
        node("rest", (), (exact, text)),
        node("end", ("frozen", "exact", "text"), ()),
    ]
    return Graph(nodes, [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_streams_and_gradients_are_exact(dtype):
    layout = payload_layout(graph(), 2, PLAN, ParallelSizes(), dtype)
    rows = payload_rows([layout])
    torch.manual_seed(0)
    values = {
        "frozen": torch.randn(5, 3).to(dtype),
        "exact": torch.randn(7, requires_grad=True),
        "text": torch.randn(4, 1, 6).to(dtype).requires_grad_(),
    }
    sent = pack(new_anchor(torch.device("cpu")), layout, rows, dtype, values)
    assert sent.shape == (rows, 1, PAYLOAD_WIDTH) and sent.dtype == dtype
    received = sent.detach().clone().requires_grad_()
    anchor, streams = unpack(received, layout)
    for name, value in values.items():
        assert torch.equal(streams[name], value), name
    assert not streams["frozen"].requires_grad and streams["exact"].requires_grad

    weight_exact, weight_text = torch.randn(7), torch.randn(4, 1, 6).to(dtype)
    loss = (streams["exact"] * weight_exact).sum() + (streams["text"] * weight_text).sum().float() + anchor.sum()
    loss.backward()
    sent.backward(received.grad)  # what the schedules do: the payload's gradient travels back
    assert torch.equal(values["exact"].grad, weight_exact)
    assert torch.equal(values["text"].grad, weight_text)


def test_a_payload_gets_a_gradient_even_if_nothing_learns_from_it():
    """The schedules send the gradient of every payload that they received."""
    layout = payload_layout(graph(), 1, PLAN, ParallelSizes(), torch.float32)
    received = torch.zeros(payload_rows([layout]), 1, PAYLOAD_WIDTH, requires_grad=True)
    anchor, streams = unpack(received, layout)
    assert list(streams) == ["frozen"]
    onward = pack(anchor, layout, received.shape[0], torch.float32, streams)
    onward.sum().backward()
    assert torch.count_nonzero(received.grad) == 0


def test_gradients_of_several_readers_add_up():
    layout = payload_layout(graph(), 2, PLAN, ParallelSizes(), torch.float32)
    received = torch.zeros(payload_rows([layout]), 1, PAYLOAD_WIDTH, requires_grad=True)
    _, streams = unpack(received, layout)
    (2 * streams["exact"].sum() + 3 * streams["exact"].sum()).backward()
    slot = next(slot for slot in layout.slots if slot.name == "exact")
    assert slot.read(received.grad.flatten()).tolist() == [5.0] * 7


def test_a_stream_of_another_shape_is_refused():
    layout = payload_layout(graph(), 1, PLAN, ParallelSizes(), torch.float32)
    with pytest.raises(ValueError, match=r"stream frozen is \(5, 4\)"):
        pack(new_anchor(torch.device("cpu")), layout, 9, torch.float32, {"frozen": torch.zeros(5, 4)})
