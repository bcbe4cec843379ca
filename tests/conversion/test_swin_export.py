"""The plain Swin V2 of an exported folder equals the training nodes after conversion by entries."""

from __future__ import annotations

import pytest
import torch

from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.hf.swin import SwinTower
from megatron_mm.platform import setup
from tests.models import swin_case
from tests.models.swin_case import assert_close

TOWERS = {
    "divides": ({}, 8),
    "padded": ({"image_size": 48, "window_size": 5, "depths": [2, 2, 1], "num_heads": [2, 2, 4]}, 6),
    "short": ({"temporal_patch_size": 4}, 3),
}


@pytest.mark.parametrize("kind", TOWERS)
def test_plain_tower_equals_training_nodes(kind):
    changes, frames = TOWERS[kind]
    setup.initialize(ParallelSizes(), seed=1)
    tower = swin_case.tower(**changes)
    graph, modules = swin_case.build(tower)
    plain = SwinTower(
        **{
            name: getattr(tower, name)
            for name in (
                "embed_dim", "depths", "num_heads", "mlp_ratio", "patch_size", "temporal_patch_size", "window_size",
                "temporal_window_size", "layernorm_epsilon",
            )
        }
    ).double()  # fmt: skip
    parameters = swin_case.named(modules)
    plain.load_state_dict(swin_case.exported(tower, {key: value.detach() for key, value in parameters.items()}))
    batch = swin_case.make_batch(tower, images=2, clips=2, frames=frames)
    memory = swin_case.run(graph, modules, batch)
    expected = torch.cat([plain(media).flatten(0, 1) for media in (batch.images_ICHW, batch.clips_VFCHW)])
    assert_close(memory, expected, "memory")
    gradient = torch.randn(expected.shape, dtype=expected.dtype)
    memory.backward(gradient)
    expected.backward(gradient)
    gradients = swin_case.exported(tower, {key: value.grad for key, value in parameters.items()})
    for name, parameter in plain.named_parameters():
        assert_close(gradients[name], parameter.grad, name)
