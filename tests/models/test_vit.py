"""The ViT tower and masked autoencoding. Truth: transformers' ViTMAE with the same random weights and noise."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from megatron.core import tensor_parallel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTMAEForPreTraining, ViTMAEModel
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from megatron_mm.config.section import changed
from megatron_mm.models.graph import ForwardContext, Graph, names_of
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.models.names import Entry
from megatron_mm.objectives.mae import mae_loss
from megatron_mm.parts.vit.mae import mae_nodes
from megatron_mm.parts.vit.nodes import vit_nodes
from tests.models import synapse_case as case
from tests.models import vit_case
from tests.models.tensor_parallel import differences


def assert_close(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    scale = max(expected.abs().max().item(), 1e-3)
    assert (found - expected).abs().max().item() <= 1e-5 * scale, name


def randomize(oracle: nn.Module) -> None:
    """Random weights, so that no bias is 0 and no norm is 1.

    transformers 5 leaves both position tables at zero where nothing is loaded; they are filled as its own
    `initialize_weights` means to, columns before rows.
    """
    with torch.no_grad():
        for parameter in oracle.parameters():
            if not parameter.requires_grad:
                grid = round((parameter.shape[1] - 1) ** 0.5)
                table = build_2d_sinusoidal_position_embedding(grid, grid, parameter.shape[2], cls_token=True)
                parameter.copy_(torch.cat(table.chunk(2, dim=1)[::-1], dim=1))
            elif parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
            else:
                parameter.copy_(torch.randn(parameter.shape) * parameter[0].numel() ** -0.5)


def fused(entry: Entry, theirs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Our tensor of an entry, from theirs."""
    made = torch.empty(entry.shape)
    for part in entry.parts:
        entry.fill(made, part, theirs[part.name].reshape(entry.part_shape(part)))
    return made


def load(modules: nn.ModuleDict, oracle: nn.Module, entries: list[Entry]) -> dict[str, nn.Parameter]:
    """Fills our parameters from theirs, and returns them by training name; every one must have an entry."""
    ours = {name.replace("/", "."): parameter for name, parameter in modules.named_parameters()}
    theirs = {name: value.detach() for name, value in oracle.named_parameters()}
    assert ours.keys() == {entry.training for entry in entries}
    with torch.no_grad():
        for entry in entries:
            ours[entry.training].copy_(fused(entry, theirs))
    return ours


def check_gradients(ours: dict[str, nn.Parameter], oracle: nn.Module, entries: list[Entry]) -> None:
    theirs = {name: p.grad for name, p in oracle.named_parameters() if p.requires_grad}
    named = {part.name for entry in entries for part in entry.parts}
    assert named == theirs.keys()
    for entry in entries:
        assert_close(ours[entry.training].grad, fused(entry, theirs), entry.training)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("ratio", [0.75, 0.4])
def test_masked_autoencoding_is_vit_maes(normalize: bool, ratio: float):
    tower, mae = vit_case.tower(), vit_case.mae(mask_ratio=ratio, normalize_pixels=normalize)
    oracle = ViTMAEForPreTraining(vit_case.hf_config(mae)).train()
    randomize(oracle)
    graph = vit_case.graph_of(LayerSettings(), mae, full=False)
    modules = case.build(graph)
    entries = [
        *names_of(vit_nodes(tower, LayerSettings(), 0.02, "vit")),
        *names_of(mae_nodes(tower, mae, LayerSettings(), 0.02, "decoder")),
    ]
    ours = load(modules, oracle, entries)
    batch = vit_case.make_batch()
    expected = oracle(batch.images_ICHW, noise=batch.patch_noise_IP)
    expected.loss.backward()
    total, streams = case.run(graph, modules, batch)
    count = graph.losses[0].count(batch)
    (total / count).backward()
    assert count == expected.mask.sum()
    assert_close(streams["mae_prediction"], expected.logits, "prediction")
    assert_close(total / count, expected.loss, "loss")
    check_gradients(ours, oracle, entries)


def test_whole_images_are_vit_maes_without_a_mask():
    tower = vit_case.tower()
    oracle = ViTMAEModel(vit_case.hf_config(vit_case.mae(), mask_ratio=0.0)).train()
    randomize(oracle)
    graph = Graph(vit_nodes(tower, LayerSettings(), 0.1), [])
    modules = case.build(graph)
    entries = names_of(vit_nodes(tower, LayerSettings(), 0.02, "model"))
    named = nn.ModuleDict({"model": oracle})
    ours = load(modules, named, entries)
    batch = vit_case.make_batch()
    batch.images_ICHW.requires_grad_()
    pixels = batch.images_ICHW.detach().clone().requires_grad_()
    in_order = torch.arange(tower.num_patches).repeat(pixels.shape[0], 1) / tower.num_patches
    expected = oracle(pixels, noise=in_order).last_hidden_state
    found = case.run(graph, modules, batch)[1]["image_memory"]
    upstream = torch.randn(expected.shape)
    found.backward(upstream)
    expected.backward(upstream)
    assert_close(found, expected, "memory")
    assert_close(batch.images_ICHW.grad, pixels.grad, "pixels")
    check_gradients(ours, named, entries)


def with_context(module: nn.Module, context: ForwardContext, *streams: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return module(*streams, context)


def test_both_applications_are_what_each_is_alone():
    """Streams are the same, and gradients are the sum, whether layers are recomputed or not."""
    tower, mae, batch = vit_case.tower(), vit_case.mae(), vit_case.make_batch()
    upstream = {
        "image_memory": torch.randn(3, 17, tower.hidden_size),
        "masked_memory": torch.randn(3, 5, tower.hidden_size),
    }
    results = {}
    kinds = {"full": (True, None), "masked": (False, mae), "both": (True, mae), "again": (True, mae)}
    for kind, (full, masked) in kinds.items():
        graph = Graph(vit_nodes(tower, LayerSettings(), 0.1, full=full, masked=masked), [])
        modules = case.build(graph)
        context, streams = ForwardContext(batch), {}
        for node in graph.nodes:
            module, inputs = modules[node.name.replace(".", "/")], [streams[name] for name in node.reads]
            if kind == "again" and node.recomputable:
                written = tensor_parallel.checkpoint(partial(with_context, module, context), False, *inputs)
            else:
                written = module(*inputs, context)
            written = written if isinstance(written, tuple) else (written,)
            streams = {stream.name: value for stream, value in zip(node.writes, written, strict=True)}
        torch.autograd.backward(list(streams.values()), [upstream[name] for name in streams])
        results[kind] = streams, {name: p.grad for name, p in modules.named_parameters()}
    (full, full_gradients), (masked, masked_gradients) = results["full"], results["masked"]
    for kind in ("both", "again"):
        streams, gradients = results[kind]
        assert_close(streams["image_memory"], full["image_memory"], kind)
        assert_close(streams["masked_memory"], masked["masked_memory"], kind)
        for name, gradient in gradients.items():
            assert_close(gradient, full_gradients[name] + masked_gradients[name], f"{kind} {name}")


def test_images_of_no_row_do_not_count():
    """A stand-in changes neither the sum nor the count, and its prediction gets no gradient."""
    tower, mae = vit_case.tower(), vit_case.mae()
    loss = mae_loss(tower, mae)
    prediction = torch.randn(3, tower.num_patches, 3 * tower.patch_size**2, requires_grad=True)
    batch, fewer = vit_case.make_batch(3, rows_with_image=2), vit_case.make_batch(2)
    batch.images_ICHW[2] = 0  # what the loader puts there
    fewer.images_ICHW, fewer.patch_noise_IP = batch.images_ICHW[:2], batch.patch_noise_IP[:2]
    value = loss.compute(prediction, ForwardContext(batch))
    value.backward()
    assert value == loss.compute(prediction[:2], ForwardContext(fewer))
    assert loss.count(batch) == loss.count(fewer) == 2 * (tower.num_patches - mae.visible_patches(tower.num_patches))
    assert torch.equal(prediction.grad[2], torch.zeros_like(prediction[2])) and prediction.grad[:2].any()
    none = vit_case.make_batch(1, rows_with_image=0)
    assert loss.compute(prediction[:1], ForwardContext(none)) == 0 == loss.count(none)


@pytest.mark.parametrize("full,masked", [(True, False), (False, True), (True, True)])
def test_costs_are_what_was_built_and_what_ran(full: bool, masked: bool):
    mae, settings = vit_case.mae(), LayerSettings()
    graph = vit_case.graph_of(settings, mae, full=full)
    if not masked:
        graph = Graph(vit_nodes(vit_case.tower(), settings, 0.1, full=full), [])
    modules = case.build(graph).to("meta")  # the counter knows attention on meta only
    batch = vit_case.make_batch().to("meta")
    context, streams = ForwardContext(batch), {}
    for node in graph.nodes:
        module = modules[node.name.replace(".", "/")]
        with FlopCounterMode(display=False) as counter:
            written = module(*[streams[name] for name in node.reads], context)
        written = written if isinstance(written, tuple) else (written,)
        streams |= {stream.name: value for stream, value in zip(node.writes, written, strict=True)}
        cost = node.cost(batch.plan)
        assert cost.parameters == sum(p.numel() for p in module.parameters()), node.name
        assert cost.forward_flops == counter.get_total_flops(), node.name
        assert [tuple(value.shape) for value in written] == [stream.shape(batch.plan) for stream in node.writes]
    for loss in graph.losses:
        loss.compute(*[streams[name] for name in loss.reads], context).backward()


@pytest.mark.parametrize(
    "name", ["vision.embeddings", "vision.layers.0", "vision.output", "mae.embeddings", "mae.output"]
)
def test_stored_bytes_cover_what_autograd_keeps(name: str):
    """Within a quarter of the bytes that autograd really saves, weights aside; `mae.output` counts the loss's error."""
    graph, batch = vit_case.graph_of(LayerSettings(), vit_case.mae(), full=True), vit_case.make_batch(8)
    node = next(node for node in graph.nodes if node.name == name)
    module = case.fill(node.build())
    own = {p.untyped_storage().data_ptr() for p in [*module.parameters(), *module.buffers()]}
    own |= {batch.images_ICHW.untyped_storage().data_ptr()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    shapes = {stream.name: stream.shape(batch.plan) for other in graph.nodes for stream in other.writes}
    inputs = [torch.randn(shapes[stream], requires_grad=True) for stream in node.reads]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(*inputs, ForwardContext(batch))
        if name == "mae.output":
            loss = graph.losses[0].compute(output, ForwardContext(batch))
    expected = 2 * node.cost(batch.plan).activation_bytes  # the test runs at four bytes a value
    if name == "mae.output":
        expected -= output.nbytes  # but the loss's error has four bytes in any precision
        del loss
    assert 0.75 <= sum(kept.values()) / expected <= 1.25, (sum(kept.values()), expected)
    del output


def test_checkpoint_keys_have_fused_norms_and_no_positions():
    graph = vit_case.graph_of(LayerSettings(), vit_case.mae(), full=True)
    for node in graph.nodes:
        module = node.build()
        assert not any("positions" in key for key in module.state_dict())
        if node.recomputable:
            keys = {value.key for value in module.sharded_state_dict("x.").values() if hasattr(value, "key")}
            assert {"x.self_attention.linear_qkv.layer_norm_weight", "x.mlp.linear_fc1.layer_norm_bias"} <= keys


def test_bf16_loss_is_summed_in_fp32():
    batch = vit_case.make_batch()
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        graph = vit_case.graph_of(LayerSettings(dtype=dtype), vit_case.mae(), full=True)
        modules = case.build(graph)
        loss, streams = case.run(graph, modules, batch)
        loss.backward()
        assert loss.dtype is torch.float32
        assert streams["image_memory"].dtype is streams["mae_prediction"].dtype is dtype
        losses[dtype] = loss.item()
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=5e-3)


def test_a_frozen_tower_does_not_learn():
    tower = vit_case.tower()
    tower = changed(tower, {"frozen": True})
    assert not any(node.trainable for node in vit_nodes(tower, LayerSettings(), 0.1))


def test_an_application_without_patches_is_refused():
    with pytest.raises(ValueError, match="whole images"):
        vit_nodes(vit_case.tower(), LayerSettings(), 0.1, full=False)
    with pytest.raises(ValueError, match=r"0\.95 leaves none of an image's 16 patches visible"):
        vit_nodes(vit_case.tower(), LayerSettings(), 0.1, masked=vit_case.mae(mask_ratio=0.95))


@pytest.mark.slow
def test_two_tensor_parallel_processes_are_one(tmp_path):
    found = differences("tests.models.vit_case:tensor_parallel_case", tmp_path)
    assert len(found) > 50
    assert max(found.values()) <= 1e-5, {name: value for name, value in found.items() if value > 1e-5}
