"""Swin V2: images against transformers' Swinv2, clips against token pairs by definition, and the forms of its costs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import Swinv2Config, Swinv2Model

from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Graph, Loss
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.models.layers.windows import WindowGrid
from megatron_mm.parts.swin.nodes import swin_nodes
from megatron_mm.parts.swin.section import SwinConfig
from megatron_mm.platform import setup
from tests.models import swin_case
from tests.models.swin_case import assert_close
from tests.models.tensor_parallel import differences

MEMORY = ("vision_memory",)

#: Windows that divide the grid; padded windows, one shifted again in stage 1, and a stage smaller than a window.
TOWERS = {
    "divides": {},
    "padded": {"image_size": 48, "window_size": 5, "depths": [2, 2, 1], "num_heads": [2, 2, 4]},
}


def swinv2(tower: SwinConfig) -> Swinv2Model:
    config = Swinv2Config(
        image_size=tower.image_size,
        patch_size=tower.patch_size,
        embed_dim=tower.embed_dim,
        depths=tower.depths,
        num_heads=tower.num_heads,
        window_size=tower.window_size,
        mlp_ratio=tower.mlp_ratio,
        drop_path_rate=0.0,
    )
    return Swinv2Model(config, add_pooling_layer=False).double().train()


def flattened(tower: SwinConfig, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of an exported tower as those of the 2D model: what an image makes of them."""
    result = {}
    for name, value in values.items():
        if name.endswith("projection.weight"):
            value = value.sum(dim=2)
        elif name.endswith("bias_mlp.0.weight"):
            value = value[:, 1:]
        elif name.endswith("logit_scale"):
            value = value[:, None, None]
        result[name] = value
    return result


@pytest.mark.parametrize("kind", TOWERS)
def test_images_are_swinv2s(kind):
    tower = swin_case.tower(**TOWERS[kind])
    graph, modules = swin_case.build(tower)
    parameters = swin_case.named(modules)
    with torch.no_grad():
        parameters["vision.stages.0.blocks.1.attention.logit_scale"][0] = math.log(120)  # beyond the largest
    oracle = swinv2(tower)
    weights = flattened(tower, swin_case.exported(tower, {k: v.detach() for k, v in parameters.items()}))
    oracle.load_state_dict(weights, strict=True)
    batch = swin_case.make_batch(tower)
    found = swin_case.run(graph, modules, batch)
    expected = oracle(batch.images_ICHW).last_hidden_state.flatten(0, 1)
    assert_close(found, expected, "memory")
    gradient = torch.randn(expected.shape, dtype=torch.float64)
    found.backward(gradient)
    expected.backward(gradient)
    # Each slice of the temporal patch sees the image; the offset in time is 0.
    for name in ("embeddings.weight", "stages.0.blocks.1.attention.position_bias.linear_offset.weight"):
        parameter = parameters[f"vision.{name}"]
        if name == "embeddings.weight":
            assert torch.equal(parameter.grad, parameter.grad[:, :, :1].expand_as(parameter))
            parameter.grad /= tower.temporal_patch_size
        else:
            assert not parameter.grad[:, 0].any()
    gradients = flattened(tower, swin_case.exported(tower, {k: v.grad for k, v in parameters.items()}))
    for name, parameter in oracle.named_parameters():
        assert_close(gradients[name], parameter.grad, name)
    graph, single = swin_case.build(tower, LayerSettings())
    single.load_state_dict(modules.state_dict())
    assert_close(swin_case.run(graph, single, batch).double(), expected, "memory in single precision")


class Definition:
    """The tower on one clip, from definitions: which pairs of tokens share a window is asked pair by pair."""

    def __init__(self, tower: SwinConfig, parameters: dict[str, nn.Parameter]) -> None:
        self.tower = tower
        self.weights = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}

    def __call__(self, clip: torch.Tensor) -> torch.Tensor:
        """[F, 3, size, size] -> [t·G², C]."""
        tower, weights = self.tower, self.weights
        kernel = (tower.temporal_patch_size, tower.patch_size, tower.patch_size)
        clip = clip.transpose(0, 1)
        while clip.shape[1] < kernel[0]:
            clip = torch.cat((clip, clip[:, -1:]), dim=1)
        prefix = "vision.embeddings"
        x = functional.conv3d(clip, weights[f"{prefix}.weight"], weights[f"{prefix}.bias"], stride=kernel)
        x = self.norm(x.permute(1, 2, 3, 0), f"{prefix}.layernorm")
        for stage, depth in enumerate(tower.depths):
            for block in range(depth):
                x = self.block(x, f"vision.stages.{stage}.blocks.{block}", tower.num_heads[stage], block % 2 == 1)
            if stage < len(tower.depths) - 1:
                x = self.merge(x, f"vision.stages.{stage}.merge")
        return self.norm(x, "vision.output.final_layernorm").flatten(0, 2)

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def merge(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Frame by frame, patch by patch."""
        rows = []
        for t, h, w in itertools.product(range(x.shape[0]), range(0, x.shape[1], 2), range(0, x.shape[2], 2)):
            rows.append(torch.cat((x[t, h, w], x[t, h + 1, w], x[t, h, w + 1], x[t, h + 1, w + 1])))
        merged = torch.stack(rows).view(x.shape[0], x.shape[1] // 2, x.shape[2] // 2, -1)
        return self.norm(merged @ self.weights[f"{name}.linear_reduction.weight"].T, f"{name}.layernorm")

    def block(self, x: torch.Tensor, name: str, heads: int, shifted: bool) -> torch.Tensor:
        weights = {key.removeprefix(f"{name}."): value for key, value in self.weights.items() if key.startswith(name)}
        x = x + self.norm(self.attention(x, weights, heads, shifted), f"{name}.attention_layernorm")
        inner = functional.gelu(x @ weights["linear_fc1.weight"].T + weights["linear_fc1.bias"])
        output = inner @ weights["linear_fc2.weight"].T + weights["linear_fc2.bias"]
        return x + self.norm(output, f"{name}.mlp_layernorm")

    def attention(self, x: torch.Tensor, weights: dict, heads: int, shifted: bool) -> torch.Tensor:
        tower, size, width = self.tower, x.shape[:3], x.shape[3]
        wanted = (tower.temporal_window_size, tower.window_size, tower.window_size)
        window = [min(w, n) for w, n in zip(wanted, size)]
        shift = [w // 2 if shifted and n > w else 0 for w, n in zip(wanted, size)]
        whole = [math.ceil(n / w) * w for w, n in zip(window, size)]
        x = functional.pad(x, [0, 0, 0, whole[2] - size[2], 0, whole[1] - size[1], 0, whole[0] - size[0]])
        tokens = list(itertools.product(*map(range, whole)))
        seen = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
        offsets = torch.zeros(len(tokens), len(tokens), 3, dtype=torch.float64)
        for (i, a), (j, b) in itertools.product(enumerate(tokens), repeat=2):
            together = True
            for d in range(3):
                moved_a, moved_b = (a[d] - shift[d]) % whole[d], (b[d] - shift[d]) % whole[d]
                if moved_a // window[d] != moved_b // window[d] or (a[d] < shift[d]) != (b[d] < shift[d]):
                    together = False
                elif window[d] > 1:
                    relative = 8.0 * (moved_a - moved_b) / (window[d] - 1)
                    offsets[i, j, d] = math.copysign(math.log2(1 + abs(relative)) / 3, relative)
            seen[i, j] = together
        qkv = weights["attention.linear_qkv.weight"].view(heads, 3, -1, width)
        q, k, v = (torch.einsum("mc,hdc->hmd", x.flatten(0, 2), qkv[:, part]) for part in range(3))
        q = q + weights["attention.query_bias"].view(heads, 1, -1)
        v = v + weights["attention.value_bias"].view(heads, 1, -1)
        cosine = torch.einsum("hmd,hnd->hmn", functional.normalize(q, dim=-1), functional.normalize(k, dim=-1))
        position = "attention.position_bias."
        inner = offsets @ weights[f"{position}linear_offset.weight"].T + weights[f"{position}linear_offset.bias"]
        bias = 16 * torch.sigmoid(inner.relu() @ weights[f"{position}head_weight"].T).permute(2, 0, 1)
        scale = weights["attention.logit_scale"].clamp(max=math.log(100)).exp().view(-1, 1, 1)
        scores = (cosine * scale + bias).masked_fill(~seen, float("-inf"))
        attended = torch.einsum("hmn,hnd->mhd", scores.softmax(dim=-1), v).flatten(1)
        output = attended @ weights["attention.linear_proj.weight"].T + weights["attention.linear_proj.bias"]
        return output.view(*whole, width)[: size[0], : size[1], : size[2]]


#: Temporal patches 4 in windows of 2, shifted in time; 3, padded to 4; 1, an image; one frame of a patch of two; and
#: windows that hold the whole clip in time.
CLIPS = {
    "shifted": ({}, 8),
    "padded": ({}, 6),
    "one": ({}, 2),
    "short": ({"temporal_patch_size": 4}, 3),
    "covered": ({"temporal_window_size": 8}, 6),
}


@pytest.mark.parametrize("kind", CLIPS)
def test_images_and_clips_are_what_token_pairs_make(kind):
    changes, frames = CLIPS[kind]
    tower = swin_case.tower(image_size=16, window_size=2, depths=[2, 1], num_heads=[2, 2], **changes)
    graph, modules = swin_case.build(tower)
    batch = swin_case.make_batch(tower, images=2, clips=2, frames=frames)
    found = swin_case.run(graph, modules, batch)
    definition = Definition(tower, swin_case.named(modules))
    media = [*batch.images_ICHW[:, None], *batch.clips_VFCHW]
    expected = torch.cat([definition(clip) for clip in media])
    assert len(expected) == 2 * tower.grid_size**2 + 2 * tower.tokens_per_clip(frames)
    assert_close(found, expected, "memory")
    gradient = torch.randn(expected.shape, dtype=torch.float64)
    found.backward(gradient)
    expected.backward(gradient)
    for name, parameter in swin_case.named(modules).items():
        assert_close(parameter.grad, definition.weights[name].grad, name)


def test_a_clip_of_equal_frames_within_a_patch_is_an_image():
    tower = swin_case.tower()
    graph, modules = swin_case.build(tower)
    batch = swin_case.make_batch(tower, images=2, clips=2, frames=2)
    batch.clips_VFCHW = batch.images_ICHW[:, None].expand(-1, 2, -1, -1, -1)
    images, clips = swin_case.run(graph, modules, batch).chunk(2)
    assert_close(clips, images, "memory")


def test_windows_hold_every_token_once_and_kinds_are_contiguous():
    grid = WindowGrid.of((3, 5, 4), (2, 2, 4), shifted=True)
    assert grid.shift == (1, 1, 0) and grid.counts == (2, 3, 1)
    order = grid.order(2, 10, torch.device("cpu"))
    assert sorted(order[order >= 0].tolist()) == list(range(10, 10 + 2 * 60))
    assert len(order) == 2 * grid.num_places == 2 * 6 * 16
    assert len(list(grid.kinds())) == 4
    first = order[: 2 * 2 * 16].view(2, 2, 2, 2, 4)  # clip, window, time, height, width: one in time, two in height
    assert first[0, 0, 0, 0].tolist() == [10 + 20 + 4 + w for w in range(4)]  # shifted by one frame and one row
    assert WindowGrid.of((2, 7, 7), (8, 7, 7), shifted=True) == WindowGrid((2, 7, 7), (2, 7, 7), (0, 0, 0))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_attention_changes_nothing(dropout):
    tower, results = swin_case.tower(), []
    for recompute in ("none", "selective"):
        settings = replace(swin_case.DOUBLE, recompute=recompute, attention_dropout=dropout, hidden_dropout=dropout)
        graph, modules = swin_case.build(tower, settings)
        setup.seed_dropout(5)
        memory = swin_case.run(graph, modules, swin_case.make_batch(tower, images=2, clips=1))
        memory.square().sum().backward()
        results.append([memory, *(parameter.grad for parameter in modules.parameters())])
    for plain, again in zip(*results):
        assert_close(again, plain, "recomputed")


def test_bf16_follows_fp32():
    tower = swin_case.tower()
    batch = swin_case.make_batch(tower, images=2, clips=1)
    graph, modules = swin_case.build(tower, LayerSettings())
    half_graph, half = swin_case.build(tower, LayerSettings(dtype=torch.bfloat16))
    expected, found = swin_case.run(graph, modules, batch), swin_case.run(half_graph, half, batch)
    found.float().sum().backward()
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("kind", TOWERS)
def test_costs_are_what_is_built_and_what_runs(kind):
    tower = swin_case.tower(**TOWERS[kind])
    graph, modules = swin_case.build(tower)
    modules.to("meta")
    for clips in (0, 2):
        batch = swin_case.make_batch(tower, clips=clips, frames=6).to("meta")
        context, streams = ForwardContext(batch), {}
        for node in graph.nodes:
            module = modules[node.name.replace(".", "/")]
            with FlopCounterMode(display=False) as counter:
                streams["vision_memory"] = module(*[streams[name] for name in node.reads], context)
            cost = node.cost(batch.plan)
            assert cost.parameters == sum(p.numel() for p in module.parameters()), node.name
            assert cost.forward_flops == counter.get_total_flops(), node.name
            assert streams["vision_memory"].shape == node.writes[0].shape(batch.plan), node.name


def test_the_reference_has_3_billion_parameters():
    tower = SwinConfig()
    plan = MicrobatchPlan(1, 8, 1, 1, 1, 1, True, 8, num_clips=1, clip_frames=16)
    nodes = swin_nodes(tower, LayerSettings(), 0.02)
    assert abs(sum(node.cost(plan).parameters for node in nodes) / 2.998e9 - 1) < 0.01
    assert nodes[-1].writes[0].shape(plan) == (49 + 392, 4096)


def test_stored_bytes_cover_what_autograd_keeps():
    """The closed forms are within a quarter of the bytes that autograd really saves: weights aside, and the scores of
    attention, which kernels that store none keep for nobody."""
    tower = swin_case.tower(embed_dim=48, num_heads=[2, 4])
    graph, modules = swin_case.build(tower, LayerSettings())
    batch = swin_case.make_batch(tower, images=4, clips=0)
    for name in ("vision.embeddings", "vision.stages.0.blocks.1", "vision.stages.0.merge", "vision.output"):
        node = next(n for n in graph.nodes if n.name == name)
        module = modules[name.replace(".", "/")]
        own = {p.untyped_storage().data_ptr() for p in module.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor, own: set[int] = own, kept: dict[int, int] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if tensor.is_floating_point() and storage.data_ptr() not in own:
                scores = tensor.dim() >= 3 and tensor.shape[-1] == tensor.shape[-2] == tower.window_size**2
                kept[storage.data_ptr()] = 0 if scores and tensor.dim() == 4 else storage.nbytes()
            return tensor

        context = ForwardContext(batch)
        stage = name.startswith("vision.output")
        inputs = [] if not node.reads else [
            torch.randn(4 * (8 // 2**stage) ** 2, 48 * 2**stage, requires_grad=True)
        ]  # fmt: skip
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = module(*inputs, context)
        expected = 2 * node.cost(batch.plan).activation_bytes  # the test runs at four bytes a value
        assert 0.75 <= sum(kept.values()) / expected <= 1.25, (name, sum(kept.values()), expected)
        del output


def parallel_case(settings: LayerSettings) -> tuple[Graph, Microbatch]:
    """Images and clips; checkpoint entries must cut what is sharded and nothing else."""
    tower, settings = swin_case.tower(), replace(settings, dtype=torch.float64)
    nodes = swin_nodes(tower, settings, 0.2)
    for name in ("vision.stages.0.blocks.1", "vision.stages.0.merge"):
        module = next(node for node in nodes if node.name == name).build()
        parameters = dict(module.named_parameters(prefix=name))
        entries = {e.key: e for e in module.sharded_state_dict(f"{name}.").values() if hasattr(e, "global_shape")}
        assert {key for key in entries if not key.endswith("_extra_state")} == parameters.keys()
        for key, parameter in parameters.items():
            expected = list(parameter.shape)
            if parameter.tensor_model_parallel:
                expected[parameter.partition_dim] *= settings.sizes.tp
            assert entries[key].global_shape == tuple(expected), key
    batch = swin_case.make_batch(tower, images=2, clips=2)
    weight = torch.randn(nodes[-1].writes[0].shape(batch.plan), generator=torch.Generator().manual_seed(3)).double()
    probe = Loss("probe", lambda memory, context: (memory * weight).sum(), lambda batch: torch.ones(()), MEMORY)
    return Graph(nodes, [probe]), batch


@pytest.mark.slow
def test_two_tensor_parallel_processes_are_one(tmp_path):
    found = differences("tests.models.test_swin:parallel_case", tmp_path)
    assert any("head_weight" in key for key in found)
    assert max(found.values()) <= 1e-5, {key: value for key, value in found.items() if value > 1e-5}
