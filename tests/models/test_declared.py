"""A module sees the fields that its node declares and those that every stage has; another is refused by name."""

from __future__ import annotations

import pytest
import torch

from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.data.reading.generated import GeneratedRows
from megatron_mm.evaluation.streams import GraphReader
from megatron_mm.models.graph import ForwardContext, Loss
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.pipeline.schedule import run_batch
from megatron_mm.planner.assembly import Assembly
from megatron_mm.platform import setup
from megatron_mm.systems.graph import build_graph
from tests.support.recipes import small_sensor


def token_sum(batch):
    return batch.tokens_RT.sum()


@pytest.fixture
def batch():
    return GeneratedRows(small_sensor()).microbatch(range(4))


def test_a_node_that_reads_what_it_does_not_declare_is_refused_in_one_process(batch):
    device = setup.initialize(ParallelSizes(), 1)
    made = small_sensor(declares=False)
    pipeline = Assembly.of(made, ParallelSizes()).build(device, 1)
    message = r"node 'tower' reads pulses_SNC, which it does not declare \(it declares none\)"
    with pytest.raises(ValueError, match=message):
        run_batch(pipeline, [batch], forward_only=True)
    with pytest.raises(ValueError, match=message):
        GraphReader(made).run(batch, ["logits"])
    pipeline = Assembly.of(small_sensor(), ParallelSizes()).build(device, 1)
    assert run_batch(pipeline, [batch], forward_only=True).losses["causal_lm"] > 0


def test_what_is_had_everywhere_needs_no_declaration(batch):
    seen = ForwardContext(batch).reading("node 'x'", frozenset({"weights_RT"})).batch
    assert seen.weights_RT is batch.weights_RT and seen.pulse_slots_RK is batch.pulse_slots_RK
    assert seen.plan is batch.plan and seen.slots("pulse")[0] is batch.pulse_slots_RK
    assert seen.loss_mask_RT is batch.loss_mask_RT and seen.clip_slots_R is None
    with pytest.raises(ValueError, match=r"node 'x' reads labels_RT, .* \(it declares weights_RT\)"):
        seen.labels_RT  # noqa: B018
    with pytest.raises(ValueError, match="node 'x' reads tensors"):
        seen.tensors  # noqa: B018
    with pytest.raises(AttributeError, match="no field 'wights_RT'"):
        seen.wights_RT  # noqa: B018


def test_what_another_node_derived_is_refused_too(batch):
    context = ForwardContext(batch)
    first = context.reading("node 'first'", frozenset({"tokens_RT"}))
    second = context.reading("node 'second'", frozenset())
    total = first.derived(token_sum)
    assert first.derived(token_sum) is total is context.derived(token_sum), "computed once"
    with pytest.raises(ValueError, match="node 'second' reads tokens_RT, which it does not declare"):
        second.derived(token_sum)
    with pytest.raises(ValueError, match="node 'second' reads tokens_RT, which it does not declare"):
        ForwardContext(batch).reading("node 'second'", frozenset()).derived(token_sum)


def test_a_count_reads_what_every_stage_has(batch):
    def loss(count) -> Loss:
        return Loss("own", lambda *_: torch.zeros(()), count, ("logits",), fields=frozenset({"labels_RT"}))

    assert loss(lambda batch: batch.loss_mask_RT.sum()).counted(batch) == float(batch.loss_mask_RT.sum())
    with pytest.raises(ValueError, match="the count of loss 'own' reads labels_RT"):
        loss(lambda batch: (batch.labels_RT > 0).sum()).counted(batch)


def test_fields_that_samples_do_not_have_are_refused_when_the_graph_is_made():
    made = small_sensor().model
    inputs = made.inputs
    graph = build_graph(made, LayerSettings())
    graph.check_fields(inputs)
    with pytest.raises(ValueError, match="node 'tower' declares pulses_SNC, which samples of this system do not have"):
        graph.check_fields(type(inputs)(64))
