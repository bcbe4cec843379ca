"""The Perceiver's layers against Hugging Face's, rows without memory, output queries, costs and layouts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import ForwardContext
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.models.names import checkpoint_key
from megatron_mm.parts.perceiver.nodes import perceiver_nodes, query_node
from megatron_mm.systems.perceiver_fusion.section import PerceiverFusionConfig
from tests.models import perceiver_case as case
from tests.models import synapse_case
from tests.models.tensor_parallel import differences


def assert_close(found: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    assert found.shape == expected.shape, name
    scale = max(expected.abs().max().item(), 1e-3)
    assert (found - expected).abs().max().item() <= 1e-5 * scale, name


def node_module(name: str) -> nn.Module:
    module = next(node for node in case.make_graph(LayerSettings()).nodes if node.name == name).build()
    case.randomize(module)
    return module


def load(module: nn.Module, oracle: nn.Module, cross: bool) -> None:
    case.randomize(oracle, seed=2)
    with torch.no_grad():
        for name, value in case.from_hf(oracle.get_parameter, cross).items():
            module.get_parameter(name).copy_(value)


def check_gradients(module: nn.Module, oracle: nn.Module, cross: bool) -> None:
    expected = case.from_hf(lambda name: oracle.get_parameter(name).grad, cross)
    assert expected.keys() == dict(module.named_parameters()).keys()
    for name, gradient in expected.items():
        assert_close(module.get_parameter(name).grad, gradient, name)


def inverted(mask: torch.Tensor) -> torch.Tensor:
    """A mask as PerceiverModel passes it to its layers."""
    return ((1.0 - mask) * torch.finfo(mask.dtype).min)[:, None, None]


def leaves(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(3)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def test_cross_layer_is_hugging_faces():
    module, oracle = node_module("perceiver.blocks.0.cross"), case.hf_layer(case.WIDTH)
    load(module, oracle, cross=True)
    latents, memory = leaves((case.ROWS, 7, 32), (case.ROWS, case.LENGTH, case.WIDTH))
    upstream = torch.randn(latents.shape)
    found = module(latents, memory, case.MASK, None)
    found.backward(upstream)
    theirs, their_memory = latents.detach().clone().requires_grad_(), memory.detach().clone().requires_grad_()
    expected = oracle(theirs, inputs=their_memory, inputs_mask=inverted(case.MASK))[0]
    expected.backward(upstream)
    assert_close(found, expected, "output")
    assert_close(latents.grad, theirs.grad, "latents")
    assert_close(memory.grad, their_memory.grad, "memory")
    assert (memory.grad[case.MASK == 0] == 0).all()
    check_gradients(module, oracle, cross=True)


def test_self_layer_is_hugging_faces():
    module, oracle = node_module("perceiver.blocks.0.layers.0"), case.hf_layer(None)
    load(module, oracle, cross=False)
    (latents,) = leaves((case.ROWS, 7, 32))
    upstream = torch.randn(latents.shape)
    found = module(latents, ForwardContext(case.make_batch()))
    found.backward(upstream)
    theirs = latents.detach().clone().requires_grad_()
    expected = oracle(theirs)[0]
    expected.backward(upstream)
    assert_close(found, expected, "output")
    assert_close(latents.grad, theirs.grad, "latents")
    check_gradients(module, oracle, cross=False)


def test_query_block_is_hugging_faces_cross_layer_on_queries():
    """Perceiver IO's decoder with `use_query_residual`; only the first two pairs are read."""
    module, oracle = node_module("perceiver.queries"), case.hf_layer(32)
    load(module.cross, oracle, cross=True)
    (latents,) = leaves((case.ROWS, 7, 32))
    found = module(latents, ForwardContext(case.make_batch()))
    upstream = torch.randn(2, case.QUERIES, 32)
    found.backward(upstream)
    theirs, queries = latents.detach().clone().requires_grad_(), module.queries.detach().clone().requires_grad_()
    expected = oracle(queries.expand(2, -1, -1), inputs=theirs[:2])[0]
    expected.backward(upstream)
    assert_close(found, expected, "output")
    assert_close(latents.grad, theirs.grad, "latents")
    assert (latents.grad[2:] == 0).all()
    assert_close(module.queries.grad, queries.grad, "queries")
    check_gradients(module.cross, oracle, cross=True)


def test_rows_without_memory_attend_to_nothing():
    """Their attention is zero: what remains is the projection's bias. Their memory gets no gradient."""
    module = node_module("perceiver.blocks.0.cross")
    latents, memory = leaves((case.ROWS, 7, 32), (case.ROWS, case.LENGTH, case.WIDTH))
    mask = case.MASK.clone()
    mask[3] = 0.0
    found = module(latents, memory, mask, None)
    found.square().sum().backward()
    alone = latents[3] + module.cross_attention.linear_proj.bias
    assert_close(found[3], alone + module.mlp(module.pre_mlp_layernorm(alone))[0], "output")
    assert_close(found[:3], module(latents, memory, case.MASK, None)[:3], "other rows")
    assert (memory.grad[3] == 0).all()
    assert torch.isfinite(latents.grad).all() and torch.isfinite(memory.grad).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in module.parameters())


def test_bf16_follows_fp32_and_recomputation_repeats():
    results = {}
    for name, settings in {
        "fp32": LayerSettings(),
        "bf16": LayerSettings(dtype=torch.bfloat16),
        "selective": LayerSettings(recompute="selective"),
    }.items():
        graph = case.make_graph(settings)
        modules = synapse_case.build(graph)
        modules["memory"].to(settings.dtype)
        loss, streams = synapse_case.run(graph, modules, case.make_batch())
        loss.backward()
        assert streams["query_states"].dtype is settings.dtype
        results[name] = streams["query_states"].float(), [parameter.grad.float() for parameter in modules.parameters()]
    found, gradients = results["fp32"]
    assert (results["bf16"][0] - found).norm() / found.norm() < 0.03
    assert torch.equal(results["selective"][0], found)
    for gradient, repeated in zip(gradients, results["selective"][1]):
        torch.testing.assert_close(repeated, gradient)


def test_evaluation_keeps_no_graph():
    """megatron-core adds residuals with gradients enabled: a view of a parameter must not reach it."""
    graph = case.make_graph(LayerSettings())
    with torch.no_grad():
        _, streams = synapse_case.run(graph, synapse_case.build(graph), case.make_batch())
    assert not streams["latents"].requires_grad and not streams["query_states"].requires_grad


def test_costs_are_what_is_built_and_what_runs():
    graph = case.make_graph(LayerSettings())
    modules = synapse_case.build(graph).to("meta")
    batch = case.make_batch().to("meta")
    context, streams = ForwardContext(batch), {}
    for node in graph.nodes:
        module = modules[node.name.replace(".", "/")]
        with FlopCounterMode(display=False) as counter:
            written = module(*[streams[name] for name in node.reads], context)
        written = written if isinstance(written, tuple) else (written,)
        streams |= {stream.name: value for stream, value in zip(node.writes, written)}
        cost = node.cost(batch.plan)
        assert cost.parameters == sum(parameter.numel() for parameter in module.parameters()), node.name
        assert cost.forward_flops == counter.get_total_flops(), node.name
        assert all(streams[stream.name].shape == stream.shape(batch.plan) for stream in node.writes), node.name
    (streams["latents"].sum() + streams["query_states"].sum()).backward()  # no value is read on the way back either
    assert all(parameter.grad.shape == parameter.shape for parameter in modules.parameters())


@pytest.mark.parametrize("name", ["perceiver.blocks.1.cross", "perceiver.queries"])
def test_stored_bytes_cover_what_autograd_keeps(name: str):
    node = next(node for node in case.make_graph(LayerSettings()).nodes if node.name == name)
    module, batch = node_module(name), case.make_batch()
    latents, memory = leaves((case.ROWS, 7, 32), (case.ROWS, case.LENGTH, case.WIDTH))
    inputs = (latents, memory, case.MASK) if len(node.reads) == 3 else (latents,)
    others = {parameter.untyped_storage().data_ptr() for parameter in (*module.parameters(), memory)}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in others:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(*inputs, ForwardContext(batch))
    expected = 2 * node.cost(batch.plan).activation_bytes  # the test runs at four bytes a value
    assert 0.75 <= sum(kept.values()) / expected <= 1.25, (sum(kept.values()), expected)
    del output


def test_the_reference_has_49_billion_parameters():
    """SYSTEMS: 4.867B of latents and blocks, without biases and norms, which are 0.002B."""
    config = PerceiverFusionConfig()
    plan = MicrobatchPlan(16, 256, 16, 1, 1, 1, True, 256)
    nodes = perceiver_nodes(
        config.perceiver, LayerSettings(), 0.02,
        memory_width=config.text.hidden_size, pairs=lambda plan: 64, memory_length=lambda plan: 513,
    )  # fmt: skip
    assert round(sum(node.cost(plan).parameters for node in nodes) / 1e9, 3) == 4.869
    queries = query_node(config.perceiver, LayerSettings(), 0.02, num_queries=256, rows=lambda plan: 16)
    assert round(queries.cost(plan).parameters / 1e9, 3) == 0.202


def test_checkpoint_keys_are_those_of_the_exporter():
    for name in ("perceiver.latents", "perceiver.blocks.1.cross", "perceiver.blocks.1.layers.0", "perceiver.queries"):
        node = next(node for node in case.make_graph(LayerSettings()).nodes if node.name == name)
        module = node.build()
        names = {checkpoint_key(f"{name}.{parameter}") for parameter, _ in module.named_parameters()}
        if hasattr(module, "sharded_state_dict"):
            keys = {value.key for value in module.sharded_state_dict(f"{name}.").values()}
            assert {key for key in keys if "_extra_state" not in key} == names


@pytest.mark.slow
def test_two_tensor_parallel_processes_are_one(tmp_path):
    found = differences("tests.models.perceiver_case:tensor_parallel_case", tmp_path)
    assert len(found) > 90 and "memory.memory" in found
    assert {key: value for key, value in found.items() if value > 1e-5} == {}
