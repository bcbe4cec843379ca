"""Closed forms of node costs against what was built (parameters) and what ran (torch's FLOP counter)."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import ForwardContext
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.systems.graph import build_graph
from megatron_mm.systems.synapse.section import SynapseConfig
from tests.models import synapse_case as case


def test_parameters_and_flops_of_every_node():
    config = case.tiny_config()
    graph = build_graph(config, LayerSettings())
    modules = case.build(graph).to("meta")  # the counter knows attention on meta only
    batch = case.make_batch(config).to("meta")
    context, streams = ForwardContext(batch), {}
    for node in graph.nodes:
        module = modules[node.name.replace(".", "/")]
        with FlopCounterMode(display=False) as counter:
            streams[node.writes[0].name] = module(*[streams[name] for name in node.reads], context)
        cost = node.cost(batch.plan)
        assert cost.parameters == sum(p.numel() for p in module.parameters()), node.name
        assert cost.forward_flops == counter.get_total_flops(), node.name
        assert streams[node.writes[0].name].shape == node.writes[0].shape(batch.plan), node.name


def test_synapse_70b_has_70_billion_parameters():
    plan = MicrobatchPlan(1, 4096, 8, 2, 8, 2, False, 4096)
    costs = {node.name: node.cost(plan).parameters for node in build_graph(SynapseConfig(), LayerSettings()).nodes}
    decoder = sum(count for name, count in costs.items() if name.startswith("decoder.layers."))
    cross = sum(count for name, count in costs.items() if name.startswith("decoder.cross_layers."))
    assert round(decoder / 1e9, 3) == 66.439
    assert round(cross / 1e9, 3) == 1.208
    assert sum(costs.values()) == 70_353_188_872


def test_stored_bytes_cover_what_autograd_keeps():
    """The closed form of a decoder layer is within a quarter of the bytes that autograd really saves, weights aside."""
    config = case.tiny_config()
    graph = build_graph(config, LayerSettings())
    batch = case.make_batch(config)
    batch.plan = MicrobatchPlan(*batch.tokens_RT.shape, 4, 2, 3, 1, True, 32)
    for name in ("decoder.layers.0", "vision.layers.0"):
        node = next(n for n in graph.nodes if n.name == name)
        module = case.fill(node.build())
        own = {p.untyped_storage().data_ptr() for p in module.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor, own: set[int] = own, kept: dict[int, int] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        stream = torch.randn(node.writes[0].shape(batch.plan), requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = module(stream, ForwardContext(batch))
        expected = 2 * node.cost(batch.plan).activation_bytes  # the test runs at four bytes a value
        assert 0.75 <= sum(kept.values()) / expected <= 1.25, (name, sum(kept.values()), expected)
        del output
