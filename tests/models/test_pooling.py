"""Pooled states and embedding heads (over several processes: test_decoder.py)."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from megatron_mm.models.graph import ForwardContext
from megatron_mm.models.layers.pooling import last_positions, last_row_state, last_state, masked_mean
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.parts.contrastive.nodes import embedding_node
from megatron_mm.parts.contrastive.section import ContrastiveConfig
from megatron_mm.parts.vit.rows import mean_patch
from tests.models import memory_case as case
from tests.models.synapse_case import fill

ROWS, WIDTH = 5, 6


def test_the_last_state_is_that_of_the_end_of_text():
    torch.manual_seed(0)
    batch = case.batch_of(range(ROWS))
    batch.document_ids_RT[3] = -1  # an empty row has the state of its first position
    lengths = (batch.document_ids_RT >= 0).sum(dim=1)
    assert lengths.tolist() == [2, 3, 4, 0, 6] and last_positions(batch).tolist() == [1, 2, 3, 0, 5]
    text = torch.randn(ROWS, case.LENGTH, WIDTH, requires_grad=True)
    expected = text[torch.arange(ROWS), (lengths - 1).clamp(min=0)]
    context = ForwardContext(batch)
    as_shard = last_state(text.reshape(-1, 1, WIDTH), context, sequence_parallel=False)
    whole = last_row_state(torch.cat((text, torch.randn_like(text))), context)  # a second variant is left out
    upstream = torch.randn(ROWS, WIDTH)
    gradients = [torch.autograd.grad(found, text, upstream)[0] for found in (expected, as_shard, whole)]
    for found, gradient in zip((as_shard, whole), gradients[1:]):
        assert torch.equal(found, expected) and torch.equal(gradient, gradients[0])


def test_the_mean_is_over_what_is_seen():
    hidden = torch.randn(3, 4, WIDTH)
    seen = torch.tensor([[True] * 4, [True, False, True, False], [False] * 4])
    found = masked_mean(hidden, seen)
    torch.testing.assert_close(found[0], hidden[0].mean(0))
    torch.testing.assert_close(found[1], hidden[1, [0, 2]].mean(0))
    assert (found[2] == 0).all()


def test_patches_are_averaged_without_the_class_token():
    batch = case.batch_of(range(ROWS))
    memory = torch.randn(ROWS, 5, WIDTH)
    found = mean_patch(memory, ForwardContext(batch))
    has = batch.image_slots_RK[:, 0] >= 0
    torch.testing.assert_close(found[has], memory[has, 1:].mean(1))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_head(normalize, dtype):
    """Norm and projection of the pooled states, in fp32 outside; its cost is what is built and what runs."""
    settings, shape = LayerSettings(dtype=dtype), case.TOWER
    part = ContrastiveConfig(embedding_size=7)

    def pool(hidden, context):
        return hidden[:, 0]

    width, norm = shape.hidden_size, shape if normalize else None
    node = embedding_node("head", "states", "embedding", settings, width, part, pool, norm)
    module, batch = fill(node.build(), node.name), case.batch_of(range(ROWS))
    hidden = torch.randn(ROWS, case.LENGTH, shape.hidden_size).to(dtype)
    found = module(hidden, ForwardContext(batch))
    state = hidden[:, 0]
    if normalize:
        norm = module.pooled_layernorm
        state = functional.layer_norm(state, (shape.hidden_size,), norm.weight, norm.bias, shape.norm_epsilon)
    assert found.dtype is torch.float32 and node.writes[0].dtype is torch.float32
    torch.testing.assert_close(found, (state @ module.projection.t()).float())
    assert module.projection.float().std().item() == pytest.approx(shape.hidden_size**-0.5, rel=0.2)
    with FlopCounterMode(display=False) as counter:
        module.to("meta")(hidden.to("meta"), ForwardContext(batch))
    cost = node.cost(batch.plan)
    assert cost.parameters == sum(parameter.numel() for parameter in module.parameters())
    assert cost.forward_flops == counter.get_total_flops()
    assert found.shape == node.writes[0].shape(batch.plan)
