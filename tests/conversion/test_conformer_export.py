"""The Conformer of exported folders against the training tower: the same weights by its entries, the same numbers."""

from __future__ import annotations

import pytest
import torch

from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.hf.conformer import ConformerModel
from megatron_mm.models.graph import names_of
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.parts.conformer.nodes import conformer_nodes
from megatron_mm.platform import setup
from tests.models import conformer_case as case
from tests.models.synapse_case import build


@pytest.fixture(autouse=True)
def one_process():
    setup.initialize(ParallelSizes(), seed=1)


def test_exported_tower_is_the_training_tower():
    tower = case.tiny_tower()
    graph, batch = case.tower_graph(tower), case.make_batch(tower)
    modules = build(graph)
    case.randomize(modules)
    plain = ConformerModel(
        num_hidden_layers=tower.num_layers,
        hidden_size=tower.hidden_size,
        num_attention_heads=tower.num_attention_heads,
        intermediate_size=tower.ffn_hidden_size,
        conv_depthwise_kernel_size=tower.conv_kernel_size,
        conv_dim=tower.front_channels,
        conv_kernel=tower.front_kernels,
        conv_stride=tower.front_strides,
        layer_norm_eps=tower.layernorm_epsilon,
    )
    entries = names_of(conformer_nodes(tower, LayerSettings(), 0.02, "audio_tower"))
    ours, tensors = case.parameters(modules), {}
    assert set(ours) == {entry.training for entry in entries}
    for entry in entries:
        tensors |= {name: part.clone() for name, part in entry.split(ours[entry.training].detach())}
    plain.load_state_dict({name.removeprefix("audio_tower."): value for name, value in tensors.items()})
    expected, found = case.memory(graph, modules, batch), plain(batch.waveforms_AN)
    case.assert_close(found, expected)
    upstream = torch.randn(found.shape)
    expected.backward(upstream)
    found.backward(upstream)
    gradients = {f"audio_tower.{name}": parameter.grad for name, parameter in plain.named_parameters()}
    for name, gradient in case.training_tensors(entries, gradients).items():
        case.assert_close(gradient, ours[name].grad, name)
