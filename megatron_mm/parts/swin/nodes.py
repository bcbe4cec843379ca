"""Swin V2 (arXiv:2111.09883) over images and, with windows in time as well, over clips (arXiv:2106.13230), as nodes.

`vision.embeddings` → `vision.stages.s.blocks.b` and, after all but the last stage, `vision.stages.s.merge` →
`vision.output`, on the flat stream `vision_memory`: the tokens of all images, then of all clips, each in the order
time, height, width. Merging halves height and width and doubles the channels, so the stream's shape is each node's own.

An image is a clip of one frame: its patch embedding sees the frame repeated over the temporal patch, and its windows
are one frame deep. Images and clips share everything that works token by token; only attention takes them apart (see
`models/layers/windows.py`). The tower is whole on every context-parallel process; heads, MLPs and merging are sharded
over tensor parallelism.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import nn
from torch.nn import functional

from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Node, NodeCost, Stream
from megatron_mm.models.layers.backends import backend_of
from megatron_mm.models.layers.costs import StackWork, copies
from megatron_mm.models.layers.final_norm import FinalNormKind
from megatron_mm.models.layers.parameters import describe, empty_parameter
from megatron_mm.models.layers.settings import LayerSettings, StackShape, layer_config
from megatron_mm.models.layers.window_attention import WindowAttention
from megatron_mm.models.layers.windows import POSITION_WIDTH, WindowGrid, Windows
from megatron_mm.models.names import Entry, Part, linear, norm, plain
from megatron_mm.models.work import Attention, MatrixProduct
from megatron_mm.parts.swin.section import SwinConfig


def stage_shape(tower: SwinConfig, stage: int, init_std: float) -> StackShape:
    """One stage as a stack of layers."""
    width = tower.embed_dim * 2**stage
    return StackShape(
        num_layers=tower.depths[stage],
        hidden_size=width,
        num_attention_heads=tower.num_heads[stage],
        num_query_groups=tower.num_heads[stage],
        ffn_hidden_size=int(width * tower.mlp_ratio),
        normalization="LayerNorm",
        norm_epsilon=tower.layernorm_epsilon,
        init_std=init_std,
    )


def stage_grids(tower: SwinConfig, stage: int, shifted: bool, plan: MicrobatchPlan) -> list[tuple[WindowGrid, int]]:
    """Windows of a stage over the microbatch's images and, if it has any, clips, with how many there are of each."""
    side = tower.image_size // tower.patch_size // 2**stage
    window = (tower.temporal_window_size, tower.window_size, tower.window_size)
    grids = [(WindowGrid.of((1, side, side), window, shifted), plan.num_images)]
    if plan.num_clips:
        depth = clip_depth(tower, plan.clip_frames)
        grids.append((WindowGrid.of((depth, side, side), window, shifted), plan.num_clips))
    return grids


def _windows(
    batch: Microbatch, grids: tuple[tuple[WindowGrid, int], ...], dtype: torch.dtype, device: torch.device
) -> Windows:
    return Windows.of(grids, dtype, device)


def clip_depth(tower: SwinConfig, frames: int) -> int:
    """Temporal patches of a clip; frames that fill none are left out, unless there is no other."""
    return max(1, frames // tower.temporal_patch_size)


def total_frames(tower: SwinConfig, plan: MicrobatchPlan) -> int:
    """Temporal patches of all images and clips."""
    return plan.num_images + plan.num_clips * clip_depth(tower, plan.clip_frames)


class PatchEmbedding(nn.Module):
    """A convolution over patches that do not overlap, and LayerNorm."""

    def __init__(self, tower: SwinConfig, settings: LayerSettings, shape: StackShape) -> None:
        super().__init__()
        width, dtype = tower.embed_dim, settings.dtype
        self.kernel = (tower.temporal_patch_size, tower.patch_size, tower.patch_size)
        self.weight = empty_parameter(width, 3, *self.kernel, dtype=dtype)
        self.bias = empty_parameter(width, dtype=dtype)
        self.layernorm = backend_of(settings).norm(layer_config(settings, shape, sharded=False), width)

    def forward(self, context: ForwardContext) -> torch.Tensor:
        """[S, C] of the microbatch's images and clips."""
        batch = context.batch
        patches = [self._embed(batch.images_ICHW[:, None])]
        if batch.plan.num_clips:
            patches.append(self._embed(batch.clips_VFCHW))
        return self.layernorm(patches[0] if len(patches) == 1 else torch.cat(patches))

    def _embed(self, clips: torch.Tensor) -> torch.Tensor:
        """[V, F, 3, H, W] -> [V·t·h·w, C]. The last frame of a clip shorter than the patch is repeated."""
        depth, patch, _ = self.kernel
        frames, weight = clips.shape[1], self.weight
        if frames < depth:
            weight = torch.cat((weight[:, :, : frames - 1], weight[:, :, frames - 1 :].sum(2, keepdim=True)), dim=2)
            depth = frames
        clips = clips[:, : frames // depth * depth].to(weight.dtype)
        cut = clips.unflatten(4, (-1, patch)).unflatten(3, (-1, patch)).unflatten(1, (-1, depth))
        patches = cut.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(0, 3)
        return functional.linear(patches, weight.flatten(1), self.bias)


class SwinBlock(MegatronModule):
    """Windowed attention and MLP, each normalised after it and before its residual is added (res-post-norm)."""

    def __init__(self, tower: SwinConfig, settings: LayerSettings, shape: StackShape, stage: int, block: int) -> None:
        config = layer_config(settings, shape, sharded=False)
        super().__init__(config)
        backend, width = backend_of(settings), shape.hidden_size
        self.tower, self.stage, self.shifted = tower, stage, block % 2 == 1
        self.attention = WindowAttention(settings, shape)
        self.attention_layernorm = backend.norm(config, width)
        self.linear_fc1 = backend.column_linear(config, width, shape.ffn_hidden_size, bias=True)
        self.linear_fc2 = backend.row_linear(config, shape.ffn_hidden_size, width, bias=True)
        self.mlp_layernorm = backend.norm(config, width)

    def forward(self, vision_memory: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """[S, C] -> [S, C]."""
        attended = self.attention(vision_memory, self._windows(vision_memory, context))
        hidden = vision_memory + self.attention_layernorm(self._dropout(attended))
        inner, _ = self.linear_fc1(hidden)
        output, _ = self.linear_fc2(functional.gelu(inner))
        return hidden + self.mlp_layernorm(self._dropout(output))

    def _windows(self, hidden: torch.Tensor, context: ForwardContext) -> Windows:
        """Made once per microbatch and chunk for all blocks of the stage that shift alike."""
        grids = stage_grids(self.tower, self.stage, self.shifted, context.batch.plan)
        return context.derived(_windows, tuple(grids), hidden.dtype, hidden.device)

    def _dropout(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.dropout(hidden, self.config.hidden_dropout, self.training)


class PatchMerging(MegatronModule):
    """Two by two patches become one of twice the width: a linear layer on all four, then LayerNorm."""

    def __init__(self, settings: LayerSettings, shape: StackShape, side: int) -> None:
        config = layer_config(settings, shape, sharded=False)
        super().__init__(config)
        backend, width = backend_of(settings), shape.hidden_size
        self.side, self.gather = side, settings.sizes.tp > 1
        self.linear_reduction = backend.column_linear(config, 4 * width, 2 * width)
        self.layernorm = backend.norm(config, 2 * width)

    def forward(self, vision_memory: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """[S, C] -> [S / 4, 2·C]."""
        half = self.side // 2
        frames = vision_memory.view(-1, half, 2, half, 2, vision_memory.shape[1])
        # Above and below vary fastest, left and right slower, as in the paper's code.
        four = frames.permute(0, 1, 3, 4, 2, 5).reshape(-1, 4 * vision_memory.shape[1])
        reduced, _ = self.linear_reduction(four)
        return self.layernorm(gather_from_tensor_model_parallel_region(reduced) if self.gather else reduced)


def block_cost(tower: SwinConfig, settings: LayerSettings, stage: int, block: int, plan: MicrobatchPlan) -> NodeCost:
    """A block on all tokens of a stage."""
    shape, sizes = stage_shape(tower, stage, 0.0), settings.sizes
    width, ffn, heads = shape.hidden_size, shape.ffn_hidden_size, shape.num_attention_heads
    matrices, position = 4 * width**2 + 2 * width * ffn, POSITION_WIDTH * heads
    # Biases of q, v and proj, of the MLP, two norms; one scale a head; the position MLP.
    parameters = matrices + 3 * width + ffn + width + 4 * width + heads + 4 * POSITION_WIDTH + position
    make, work, values = StackWork(settings), [], 0.0
    own, channels = make.split(heads, "heads"), make.split(width, "channels")
    places_of_all = tokens_of_all = 0
    for grid, clips in stage_grids(tower, stage, block % 2 == 1, plan):
        tokens, places, pairs = clips * grid.num_tokens, clips * grid.num_places, heads * grid.length**2
        places_of_all, tokens_of_all = places_of_all + places, tokens_of_all + tokens
        windows = places // grid.length
        work += [
            MatrixProduct(grid.num_offsets, POSITION_WIDTH, 3, what="position bias"),
            MatrixProduct(grid.num_offsets, own, POSITION_WIDTH, what="position bias"),
            make.moved(2 * own * grid.length**2, "position bias"),
            *make.summed_gradient(4 * POSITION_WIDTH, "position bias"),
            Attention(windows, grid.length, grid.length, own, own, shape.head_dim, what="attention in windows"),
        ]
        # Whole: what the linears read of tokens, and what both norms read. Sharded: q, k, v and attention output with
        # its log-sum-exp; what GELU and fc2 read; the bias of each kind of window.
        values += (places + 3 * tokens) * width * sizes.tp + 4 * places * width + 2 * places * heads
        values += 2 * tokens * ffn + pairs * len(list(grid.kinds()))
        values += grid.num_offsets * (2 * POSITION_WIDTH * sizes.tp + 2 * heads)
    work += [
        make.moved((places_of_all + tokens_of_all) * width, "order of windows", count=2),
        *make.column(places_of_all, width, 3 * width, "queries, keys, values"),
        make.moved(2 * 3 * places_of_all * channels, "cosine of queries and keys"),
        *make.row(places_of_all, width, width, "attention output"),
        *make.column(tokens_of_all, width, ffn, "fc1"),
        make.moved(2 * tokens_of_all * make.split(ffn, "inner width"), "activation"),
        *make.row(tokens_of_all, ffn, width, "fc2"),
        *(make.norm(tokens_of_all, width), make.outside(tokens_of_all, width, 3, "residual")) * 2,
    ]
    return NodeCost(parameters, tuple(work), 2.0 * values * sizes.cp, sizes.tp_cp)


def merge_cost(tower: SwinConfig, settings: LayerSettings, stage: int, plan: MicrobatchPlan) -> NodeCost:
    """The merging after a stage."""
    width, sizes = tower.embed_dim * 2**stage, settings.sizes
    tokens = total_frames(tower, plan) * (tower.image_size // tower.patch_size // 2 ** (stage + 1)) ** 2
    stored = 2.0 * tokens * 6 * width * copies(sizes, sharded=False)
    make = StackWork(settings)
    work = (
        make.moved(8 * tokens * width, "four patches"),
        *make.column(tokens, 4 * width, 2 * width, "reduction"),
        *make.collective("all_gather", tokens * 2 * width, "forward", "reduction"),
        make.norm(tokens, 2 * width),
    )
    return NodeCost(8 * width**2 + 4 * width, work, stored, sizes.tp_cp)


@dataclass(frozen=True)
class EmbeddingsKind:
    """Patches of all images and clips, on every process."""

    tower: SwinConfig
    settings: LayerSettings
    init_std: float

    def build(self) -> nn.Module:
        """The module."""
        shape = stage_shape(self.tower, 0, self.init_std)
        return describe(PatchEmbedding(self.tower, self.settings, shape), init_std=self.init_std)

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """One product of the patches."""
        tower = self.tower
        width, pixels, places = tower.embed_dim, 3 * tower.patch_size**2, (tower.image_size // tower.patch_size) ** 2
        depth = min(tower.temporal_patch_size, max(1, plan.clip_frames))
        deep = plan.num_images + plan.num_clips * clip_depth(tower, plan.clip_frames) * depth
        tokens = total_frames(tower, plan) * places
        parameters = pixels * tower.temporal_patch_size * width + 3 * width
        every = copies(self.settings.sizes, sharded=False)
        stored = 2.0 * every * (deep * places * pixels + tokens * width)
        make, deep_clip, frames = StackWork(self.settings), depth * pixels, total_frames(tower, plan) - plan.num_images
        work = [
            make.moved(2 * deep * places * pixels, "patches"),
            MatrixProduct(plan.num_images * places, width, pixels, what="patches of images"),
            make.norm(tokens, width),
        ]
        if frames:
            work.append(MatrixProduct(frames * places, width, deep_clip, what="patches of clips"))
        return NodeCost(parameters, tuple(work), stored, self.settings.sizes.tp_cp)

    def names(self, node: str, exported: str) -> Iterator[Entry]:
        """Swin V2's."""
        tower, width, hf = self.tower, self.tower.embed_dim, f"{exported}.embeddings"
        patch = (3, tower.temporal_patch_size, tower.patch_size, tower.patch_size)
        yield plain(f"{node}.weight", f"{hf}.patch_embeddings.projection.weight", width, *patch)
        yield plain(f"{node}.bias", f"{hf}.patch_embeddings.projection.bias", width)
        yield from norm(f"{node}.layernorm", f"{hf}.norm", width, bias=True)


@dataclass(frozen=True)
class BlockKind:
    """A block of a stage; every second one shifts its windows."""

    tower: SwinConfig
    settings: LayerSettings
    init_std: float
    stage: int
    number: int

    def build(self) -> nn.Module:
        """The block."""
        shape = stage_shape(self.tower, self.stage, self.init_std)
        heads = shape.num_attention_heads
        return describe(
            SwinBlock(self.tower, self.settings, shape, self.stage, self.number),
            init_std=self.init_std,
            column={"linear_qkv": heads, "attention": heads, "position_bias": heads, "linear_fc1": None},
            row={"linear_proj": heads, "linear_fc2": None},
            constants={"logit_scale": math.log(10.0)},
        )

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """See block_cost."""
        return block_cost(self.tower, self.settings, self.stage, self.number, plan)

    def names(self, node: str, exported: str) -> Iterator[Entry]:
        """Swin V2's."""
        shape = stage_shape(self.tower, self.stage, self.init_std)
        width, heads, ffn = shape.hidden_size, shape.num_attention_heads, shape.ffn_hidden_size
        attention, theirs = f"{node}.attention", f"{exported}.attention.self"
        parts = tuple(Part(f"{theirs}.{kind}.weight") for kind in ("query", "key", "value"))
        yield Entry(f"{attention}.linear_qkv.weight", parts, heads, width // heads, (width,))
        yield plain(f"{attention}.query_bias", f"{theirs}.query.bias", width)
        yield plain(f"{attention}.value_bias", f"{theirs}.value.bias", width)
        yield plain(f"{attention}.logit_scale", f"{theirs}.logit_scale", heads)
        position, mlp = f"{attention}.position_bias", f"{theirs}.continuous_position_bias_mlp"
        yield from linear(f"{position}.linear_offset", f"{mlp}.0", POSITION_WIDTH, 3)
        yield plain(f"{position}.head_weight", f"{mlp}.2.weight", heads, POSITION_WIDTH)
        yield from linear(f"{attention}.linear_proj", f"{exported}.attention.output.dense", width, width)
        yield from norm(f"{node}.attention_layernorm", f"{exported}.layernorm_before", width, bias=True)
        yield from linear(f"{node}.linear_fc1", f"{exported}.intermediate.dense", ffn, width)
        yield from linear(f"{node}.linear_fc2", f"{exported}.output.dense", width, ffn)
        yield from norm(f"{node}.mlp_layernorm", f"{exported}.layernorm_after", width, bias=True)


@dataclass(frozen=True)
class MergeKind:
    """The merging after a stage."""

    tower: SwinConfig
    settings: LayerSettings
    init_std: float
    stage: int

    def build(self) -> nn.Module:
        """The module."""
        side = self.tower.image_size // self.tower.patch_size // 2**self.stage
        module = PatchMerging(self.settings, stage_shape(self.tower, self.stage, self.init_std), side)
        return describe(module, init_std=self.init_std, column={"linear_reduction": None})

    def cost(self, plan: MicrobatchPlan) -> NodeCost:
        """See merge_cost."""
        return merge_cost(self.tower, self.settings, self.stage, plan)

    def names(self, node: str, exported: str) -> Iterator[Entry]:
        """Swin V2's."""
        width = self.tower.embed_dim * 2**self.stage
        yield from linear(f"{node}.linear_reduction", f"{exported}.reduction", 2 * width, 4 * width, bias=False)
        yield from norm(f"{node}.layernorm", f"{exported}.norm", 2 * width, bias=True)


def swin_nodes(
    tower: SwinConfig, settings: LayerSettings, init_std: float, exported: str = "vision_tower"
) -> list[Node]:
    """Nodes of the tower.

    Args:
        init_std: deviation of matrices.
        exported: the tower's name in the exported model.
    """
    stages, side = len(tower.depths), tower.image_size // tower.patch_size
    reads, fields = ("vision_memory",), frozenset({"images_ICHW", "clips_VFCHW"})
    options = {"trainable": not tower.frozen, "recomputable": True}

    def memory(stage: int) -> Stream:
        tokens, width = (side // 2**stage) ** 2, tower.embed_dim * 2**stage
        return Stream("vision_memory", lambda plan: (total_frames(tower, plan) * tokens, width))

    def sequences(plan: MicrobatchPlan) -> list[tuple[int, int]]:
        return [(total_frames(tower, plan), tower.grid_size**2)]

    embeddings = EmbeddingsKind(tower, settings, init_std)
    nodes = [
        Node("vision.embeddings", embeddings, (), (memory(0),), exported, fields, trainable=not tower.frozen)
    ]
    for stage, depth in enumerate(tower.depths):
        name, place = f"vision.stages.{stage}", f"{exported}.encoder.layers.{stage}"
        for number in range(depth):
            kind, at = BlockKind(tower, settings, init_std, stage, number), f"blocks.{number}"
            nodes.append(Node(f"{name}.{at}", kind, reads, (memory(stage),), f"{place}.{at}", **options))
        if stage < stages - 1:
            kind = MergeKind(tower, settings, init_std, stage)
            written = (memory(stage + 1),)
            nodes.append(Node(f"{name}.merge", kind, reads, written, f"{place}.downsample", **options))
    output = FinalNormKind(settings, stage_shape(tower, stages - 1, init_std), sequences)
    written, place = (memory(stages - 1),), f"{exported}.layernorm"
    return [*nodes, Node("vision.output", output, reads, written, place, trainable=not tower.frozen)]
