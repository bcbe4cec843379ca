"""Activations on the host: the same bits, fewer bytes on the device, and no weights moved."""

import pytest
import torch

from megatron_mm.config.section import changed
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.data.reading.generated import GeneratedRows
from megatron_mm.pipeline import offload
from megatron_mm.pipeline.schedule import run_batch
from megatron_mm.planner.assembly import Assembly
from megatron_mm.platform import setup
from megatron_mm.training.optimizer import Optimizer
from tests.support.recipes import small_config


def step(layers: int, recompute: str) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, gradients and bytes on the host of a step of two microbatches."""
    config = changed(
        small_config(),
        {
            "parallel.recompute_granularity": recompute,
            "performance.cpu_offloading_num_layers": layers,
        },
    )
    device = setup.initialize(ParallelSizes(), seed=1)
    pipeline = Assembly.of(config, ParallelSizes()).build(device, seed=1)
    Optimizer(config, pipeline).zero_grad()
    rows = GeneratedRows(config)
    result = run_batch(pipeline, [rows.microbatch([0, 1]), rows.microbatch([2, 3])])
    (chunk,) = pipeline.bare_chunks
    gradients = {name: p.main_grad.clone() for name, p in chunk.named_parameters() if p.requires_grad}
    return result.total, gradients, chunk.bytes_on_host


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_step_is_the_same(recompute, monkeypatch):
    monkeypatch.setattr(offload, "MIN_BYTES", 512)
    loss, gradients, nothing = step(0, recompute)
    assert nothing == 0
    few, more = step(2, recompute), step(4, recompute)
    for found in (few, more):
        assert found[0] == loss
        assert all(torch.equal(found[1][name], value) for name, value in gradients.items())
    assert 0 < few[2] < more[2]


def test_weights_and_small_tensors_stay_and_what_is_saved_twice_counts_once(monkeypatch):
    monkeypatch.setattr(offload, "MIN_BYTES", 400)
    linear, small = torch.nn.Linear(16, 16), torch.randn(2, 16, requires_grad=True)
    inputs = torch.randn(8, 16, requires_grad=True)
    with offload.Offload(linear) as moved:
        hidden = linear(inputs).exp()  # saves its result
        total = (hidden * hidden).sum() + (small * small).sum()
    assert moved.moved == 2 * 8 * 16 * 4  # the inputs and the hidden values; neither the weight nor the small tensor
    assert moved.stayed == 2 * 16 * 4  # which is saved twice, and held once
    total.backward()
    plain = inputs.detach().clone().requires_grad_()
    linear(plain).exp().square().sum().backward()
    torch.testing.assert_close(inputs.grad, plain.grad)


def test_what_is_changed_in_place_is_kept_as_it_was(monkeypatch):
    """As it was when it was saved: under two numbers of its version, or behind autograd's back."""
    monkeypatch.setattr(offload, "MIN_BYTES", 1)
    values = torch.arange(4.0)
    first, second, third = (torch.ones(4, requires_grad=True) for _ in range(3))
    with offload.Offload(torch.nn.Identity()):
        total = (values * first).sum()
        values.add_(10.0)
        total = total + (values * second).sum()
        squares = third * 2.0
        total = total + (squares * squares).sum()
    squares.data.zero_()
    total.backward()
    assert first.grad.tolist() == [0.0, 1.0, 2.0, 3.0] and second.grad.tolist() == [10.0, 11.0, 12.0, 13.0]
    assert third.grad.tolist() == [8.0] * 4


def test_parts_of_one_tensor_are_told_apart(monkeypatch):
    """By where they begin and how they are strided."""
    monkeypatch.setattr(offload, "MIN_BYTES", 1)
    whole = torch.arange(8.0)
    weights = [torch.ones(2, 2, requires_grad=True) for _ in range(3)]
    parts = [whole[:4].view(2, 2), whole[4:].view(2, 2), whole[:4].view(2, 2).T]
    with offload.Offload(torch.nn.Identity()) as moved:
        total = sum((part * weight).sum() for part, weight in zip(parts, weights))
    total.backward()
    for part, weight in zip(parts, weights):
        assert torch.equal(weight.grad, part)
    assert moved.moved == 3 * 4 * 4


def test_a_tensor_in_the_place_of_one_that_is_gone_is_another(monkeypatch):
    monkeypatch.setattr(offload, "MIN_BYTES", 1)
    weights = [torch.ones(4, requires_grad=True) for _ in range(8)]
    with offload.Offload(torch.nn.Identity()):
        total = sum((torch.full((4,), float(number)) * weight).sum() for number, weight in enumerate(weights))
    total.backward()
    assert [weight.grad.tolist() for weight in weights] == [[float(number)] * 4 for number in range(8)]
