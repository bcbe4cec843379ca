"""The contrastive loss: CLIP's, and that of one process whatever holds the rows, in value and in every gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from megatron_mm.models.graph import ForwardContext
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.objectives.contrastive import image_text_loss, info_nce
from megatron_mm.parts.contrastive.nodes import scale_node
from megatron_mm.parts.contrastive.section import ContrastiveConfig
from tests.models.synapse_case import fill
from tests.objectives.cases import rows
from tests.support.graph_layouts import largest_difference, step

#: fp32 sums in other orders.
EXACT = 1e-6


def test_loss_and_every_gradient_of_a_clip():
    """A small CLIP learns from its own loss and from ours of its embeddings."""
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 30, "max_position_embeddings": 8, "bos_token_id": 28, "eos_token_id": 29},
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=12,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).double()  # biases of keys have no gradient but rounding
    inputs = {"input_ids": torch.randint(0, 30, (7, 8)), "pixel_values": torch.randn(7, 3, 16, 16).double()}
    theirs = model(**inputs, return_loss=True)
    theirs.loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert expected["logit_scale"].abs() > 1e-3
    model.zero_grad()
    embeddings = model(**inputs)
    valid, scale = torch.ones(7).double(), model.logit_scale.exp()
    ours = info_nce(embeddings.image_embeds, embeddings.text_embeds, valid, scale) / 7
    assert ours.item() == pytest.approx(theirs.loss.item(), rel=EXACT)
    ours.backward()
    for name, parameter in model.named_parameters():
        scale = max(expected[name].abs().max().item(), 1e-3)
        assert (parameter.grad - expected[name]).abs().max().item() <= EXACT * scale, name


def test_rows_that_lack_one_of_the_two_do_not_take_part():
    torch.manual_seed(0)
    valid = torch.tensor([1.0, 0, 1, 1, 0, 1])
    values = [torch.randn(6, 5) for _ in range(2)]
    ours = [value.clone().requires_grad_() for value in values]
    theirs = [value.clone().requires_grad_() for value in values]
    total = info_nce(*ours, valid, torch.tensor([4.0]))
    first, second = (functional.normalize(value[valid > 0], dim=-1) for value in theirs)
    expected = image_text_contrastive_loss(4.0 * first @ second.t()) * 4
    total.backward()
    expected.backward()
    assert total.item() == pytest.approx(expected.item(), rel=EXACT)
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one.grad, other.grad, rtol=EXACT, atol=EXACT)
        assert (one.grad[valid == 0] == 0).all()


def test_nothing_valid_is_zero_with_zero_gradient():
    values = [torch.randn(3, 5, requires_grad=True) for _ in range(2)]
    total = info_nce(*values, torch.zeros(3), torch.tensor([4.0]))
    total.backward()
    assert total.item() == 0 and all((value.grad == 0).all() for value in values)


def test_the_scale_begins_with_the_temperature_is_bounded_and_can_come_back():
    node = scale_node(LayerSettings(), ContrastiveConfig(temperature=0.07, max_scale=100.0))
    module, context = fill(node.build(), node.name), ForwardContext(rows([0], {0}))
    assert module(context).item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        module.log_scale.fill_(math.log(150.0))
    scale = module(context)
    assert scale.item() == pytest.approx(100.0)
    scale.backward()
    assert module.log_scale.grad.item() > 0, "a scale beyond its bound must still be able to fall"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["DP4", "DP2xPP2"])
def test_layouts_have_one_process_loss_and_gradients(in_four_processes, layout):
    """Of four processes one has no valid row in the first pool, three have none in the second."""
    one = step("tests.objectives.cases:contrastive", "DP1", 8, 16)
    assert len(one["gradients"]) == 3 and all(gradient.abs().max() > 1e-4 for gradient in one["gradients"].values())
    assert largest_difference(in_four_processes["contrastive", layout], one) <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["DP4", "DP2xPP2", "CP2xDP2"])
def test_negatives_of_the_whole_batch_in_layouts(in_four_processes, layout):
    """Truth is one process and one microbatch of all samples, without any cache."""
    direct = step("tests.objectives.cases:contrastive", "DP1", 16, 16)
    assert largest_difference(in_four_processes["contrastive_over_batch", layout], direct) <= EXACT


@pytest.mark.parametrize("pool", [2, 8])
def test_cached_gradients_are_those_of_one_microbatch(pool):
    direct = step("tests.objectives.cases:contrastive", "DP1", 16, 16)
    cached = step("tests.objectives.cases:contrastive_over_batch", "DP1", pool, 16)
    assert largest_difference(cached, direct) <= EXACT
    fewer = step("tests.objectives.cases:contrastive", "DP1", pool, 16)
    assert fewer["losses"]["contrastive"] < direct["losses"]["contrastive"] - 0.1


def test_a_loss_that_no_row_counts_for_has_no_count():
    loss = image_text_loss(ContrastiveConfig(), 1.0)
    assert loss.count(rows([0, 1, 2], {1})).item() == 1 and loss.count(rows([3], set())).item() == 0
