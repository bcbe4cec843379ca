"""The plain Perceiver of exported folders against the training nodes, weights carried over by the entries."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch import nn

from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.hf.perceiver import PerceiverQueries, PerceiverTower
from megatron_mm.models.graph import names_of
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.parts.perceiver.nodes import perceiver_nodes, query_node
from megatron_mm.platform import setup
from tests.models import perceiver_case, synapse_case


@pytest.fixture(autouse=True)
def one_process():
    setup.initialize(ParallelSizes(), seed=1)


def plain_modules() -> nn.ModuleDict:
    """What a folder holds, under the entries' prefixes."""
    sizes = asdict(perceiver_case.tiny())
    names = ("hidden_size", "num_attention_heads", "ffn_hidden_size", "layernorm_epsilon")
    queries = PerceiverQueries(num_queries=perceiver_case.QUERIES, **{name: sizes[name] for name in names})
    return nn.ModuleDict({"tower": PerceiverTower(memory_width=perceiver_case.WIDTH, **sizes), "queries": queries})


def test_plain_modules_are_the_training_nodes():
    """Latents and query states, with a row that sees nothing; weights go there and back unchanged, none left out."""
    mask = perceiver_case.MASK.clone()
    mask[3] = 0.0
    graph = perceiver_case.make_graph(LayerSettings(), mask)
    modules = synapse_case.build(graph)
    memory = modules["memory"].memory.detach().clone()
    perceiver_case.randomize(modules)
    modules["memory"].memory.data.copy_(memory)
    with torch.no_grad():
        _, streams = synapse_case.run(graph, modules, perceiver_case.make_batch())
    ours = {name.replace("/", "."): parameter.detach() for name, parameter in modules.named_parameters()}
    config = perceiver_case.tiny()
    entries = names_of(
        perceiver_nodes(
            config,
            LayerSettings(),
            0.02,
            "tower",
            memory_width=perceiver_case.WIDTH,
            pairs=lambda plan: 1,
            memory_length=lambda plan: 1,
        )
    )
    entries += names_of(
        [query_node(config, LayerSettings(), 0.02, "queries", num_queries=perceiver_case.QUERIES, rows=lambda plan: 1)]
    )
    assert {entry.training for entry in entries} == ours.keys() - {"memory.memory"}
    tensors = dict(pair for entry in entries for pair in entry.split(ours[entry.training]))
    for entry in entries:
        back = torch.full(entry.shape, float("nan"))
        for part in entry.parts:
            entry.fill(back, part, tensors[part.name])
        assert torch.equal(back, ours[entry.training]), entry.training

    plain = plain_modules()
    plain.load_state_dict(tensors)
    latents = plain["tower"](memory, mask)
    states = plain["queries"](latents[:2])
    for found, name in ((latents, "latents"), (states, "query_states")):
        scale = streams[name].abs().max()
        assert (found - streams[name]).abs().max() <= 1e-5 * scale, name
    (latents.square().sum() + states.square().sum()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in plain.parameters())


def test_without_a_mask_all_is_seen():
    plain = plain_modules()
    perceiver_case.randomize(plain)
    memory = torch.randn(2, perceiver_case.LENGTH, perceiver_case.WIDTH)
    found, expected = plain["tower"](memory), plain["tower"](memory, torch.ones(memory.shape[:2]))
    torch.testing.assert_close(found, expected)


def test_modules_made_on_meta_are_whole_after_loading():
    """transformers builds a model on meta and fills its weights; nothing else may be needed."""
    plain = plain_modules()
    perceiver_case.randomize(plain)
    with torch.device("meta"):
        made = plain_modules()
    made.to_empty(device="cpu").load_state_dict(plain.state_dict())
    memory = torch.randn(2, perceiver_case.LENGTH, perceiver_case.WIDTH)
    assert torch.equal(made["queries"](made["tower"](memory)), plain["queries"](plain["tower"](memory)))
