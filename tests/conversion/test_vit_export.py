"""The plain ViT and MAE decoder of exported folders against the training nodes, weights carried over by the entries."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.hf.vit import MAEDecoder, ViTTower, masked_pixel_error
from megatron_mm.models.graph import names_of
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.parts.vit.mae import mae_nodes
from megatron_mm.parts.vit.nodes import vit_nodes
from megatron_mm.platform import setup
from tests.models import synapse_case as case
from tests.models import vit_case


@pytest.fixture(autouse=True)
def one_process():
    setup.initialize(ParallelSizes(), seed=1)


def plain_modules() -> nn.ModuleDict:
    """What a folder holds, under the entries' prefixes."""
    tower, mae = vit_case.tower(), vit_case.mae()
    common = {
        "patch_size": tower.patch_size,
        "image_size": tower.image_size,
        "layernorm_epsilon": tower.layernorm_epsilon,
    }

    def sizes(part) -> dict[str, int]:
        names = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size")
        return {name: getattr(part, name) for name in names} | common

    decoder = MAEDecoder(tower_hidden_size=tower.hidden_size, **sizes(mae))
    return nn.ModuleDict({"vision_tower": ViTTower(**sizes(tower)), "mae_decoder": decoder})


def test_plain_modules_are_the_training_nodes():
    """Both applications, prediction and loss; and the weights go there and back unchanged, leaving none out."""
    tower, mae, batch = vit_case.tower(), vit_case.mae(), vit_case.make_batch()
    graph = vit_case.graph_of(LayerSettings(), mae, full=True)
    modules = case.build(graph)
    ours = {name.replace("/", "."): parameter.detach() for name, parameter in modules.named_parameters()}
    with torch.no_grad():
        for parameter in ours.values():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
        total, streams = case.run(graph, modules, batch)
    entries = [
        *names_of(vit_nodes(tower, LayerSettings(), 0.02, "vision_tower")),
        *names_of(mae_nodes(tower, mae, LayerSettings(), 0.02, "mae_decoder")),
    ]
    assert {entry.training for entry in entries} == ours.keys()
    exported = dict(pair for entry in entries for pair in entry.split(ours[entry.training]))
    for entry in entries:
        back = torch.full(entry.shape, float("nan"))
        for part in entry.parts:
            entry.fill(back, part, exported[part.name])
        assert torch.equal(back, ours[entry.training]), entry.training

    plain = plain_modules()
    plain.load_state_dict(exported)
    images, noise, visible = batch.images_ICHW, batch.patch_noise_IP, mae.visible_patches(tower.num_patches)
    with torch.no_grad():
        memory = plain["vision_tower"](images)
        masked = plain["vision_tower"](images, noise, visible)
        prediction = plain["mae_decoder"](masked, noise)
        error = masked_pixel_error(images, prediction, noise, visible, tower.patch_size, mae.normalize_pixels)
    for found, name in ((memory, "image_memory"), (masked, "masked_memory"), (prediction, "mae_prediction")):
        torch.testing.assert_close(found, streams[name], atol=1e-5, rtol=1e-5, msg=name)
    torch.testing.assert_close(error, total / graph.losses[0].count(batch), atol=1e-6, rtol=1e-5)


def test_modules_made_on_meta_compute_their_positions():
    """transformers builds a model on meta and fills its weights; what is not a weight must survive that."""
    images = vit_case.make_batch().images_ICHW
    expected = plain_modules()
    with torch.device("meta"):
        made = plain_modules()
    made.to_empty(device="cpu").load_state_dict(expected.state_dict())
    assert torch.equal(made["vision_tower"](images), expected["vision_tower"](images))
    half = expected["vision_tower"].to(torch.bfloat16)(images)
    assert half.dtype is torch.bfloat16
