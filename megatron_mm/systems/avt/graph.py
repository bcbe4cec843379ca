"""AVT-33B: Swin and Conformer encoders, fused by cross-attention, before a decoder that reads the fused memory.

Streams: `vision_memory` (flat: images, then clips) and `audio_memory` [A, N, C], from the encoders; their pooled
embeddings for the audio-visual contrastive loss; `vision_rows` and `audio_rows`, one memory a row at the fusion's
width; `memory` [R, Mv + Ma, H], both after fusion, at the decoder's width; `text`, which every decoder layer rewrites.
Microbatches of task `masked_lm` read masked tokens and see both sides, those of `generation` are causal: the weights
are the same (UniLM, arXiv:1905.03197).

Shape suffixes: R rows, Mv, Ma memory positions of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Graph, Node, NodeCost, Stream
from megatron_mm.models.layers.attention import AttentionPlan
from megatron_mm.models.layers.backends import backend_of
from megatron_mm.models.layers.costs import copies
from megatron_mm.models.layers.memory_attention import ViewMaker, memory_layer, memory_layer_cost
from megatron_mm.models.layers.parameters import describe, empty_parameter
from megatron_mm.models.layers.pooling import masked_mean
from megatron_mm.models.layers.settings import LayerSettings, StackShape, layer_config
from megatron_mm.objectives.causal_lm import causal_lm_loss
from megatron_mm.objectives.contrastive import contrastive_loss
from megatron_mm.objectives.masked_lm import masked_lm_loss
from megatron_mm.parts.conformer.nodes import conformer_nodes
from megatron_mm.parts.contrastive.nodes import embedding_node, scale_node
from megatron_mm.parts.decoder.nodes import DecoderNodes
from megatron_mm.parts.swin.nodes import swin_nodes
from megatron_mm.parts.swin.section import SwinConfig
from megatron_mm.systems.avt.section import AVTConfig


def build_graph(config: AVTConfig, settings: LayerSettings) -> Graph:
    """The graph; what an objective of weight zero alone would need is left out."""
    masked, generates = "masked_lm" in config.tasks, "generation" in config.tasks
    losses, kind = [], settings.performance.cross_entropy
    nodes = swin_nodes(config.vision, settings, config.init_std)
    nodes += conformer_nodes(config.audio, settings, config.init_std)
    if config.contrastive_weight > 0:
        nodes += _contrastive_nodes(config, settings)
        losses.append(
            contrastive_loss(
                "contrastive",
                ("vision_embedding", "audio_embedding", "logit_scale"),
                seen_and_heard,
                weight=config.contrastive_weight,
                whole_batch=config.contrastive.negatives == "batch",
            )
        )
    if masked or generates:
        nodes += _fusion_nodes(config, settings)
        nodes += _decoder_nodes(config, settings, masked)
    if masked:
        tasks = frozenset({"masked_lm"})
        losses.append(masked_lm_loss(weight=config.masked_lm_weight, tasks=tasks, kind=kind))
    if generates:
        tasks = frozenset({"generation"})
        losses.append(causal_lm_loss("generation", weight=config.generation_weight, tasks=tasks, kind=kind))
    return Graph(nodes, losses)


# --------------------------------------------------------------------------------------- which memory a row has


def vision_length(vision: SwinConfig, plan: MicrobatchPlan) -> int:
    """Mv: positions of a clip where the microbatch has one, else of an image."""
    return vision.tokens_per_clip(plan.clip_frames if plan.num_clips else 1)


def vision_positions(batch: Microbatch, image_tokens: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each row's positions lie in `vision_memory`, [R·Mv], and which of them exist, [R, Mv] bool.

    Args:
        image_tokens: positions of an image.
        length: Mv, see vision_length.
    """
    plan = batch.plan
    images_R1, at = batch.image_slots_RK[:, :1], torch.arange(length, device=batch.image_slots_RK.device)[None]
    of_image = (images_R1 >= 0) & (at < image_tokens)
    index = images_R1.clamp(min=0) * image_tokens + at.clamp(max=image_tokens - 1)
    if not plan.num_clips:
        return index.flatten(), of_image
    clips_R1 = batch.clip_slots_R[:, None]
    in_clips = plan.num_images * image_tokens + clips_R1.clamp(min=0) * length + at
    return torch.where(clips_R1 >= 0, in_clips, index).flatten(), (clips_R1 >= 0) | of_image


def _seen_positions(vision: SwinConfig, batch: Microbatch) -> torch.Tensor:
    return vision_positions(batch, vision.tokens_per_clip(1), vision_length(vision, batch.plan))[1]


def has_sound(batch: Microbatch) -> torch.Tensor:
    """[R] bool."""
    return batch.sound_slots_RJ[:, 0] >= 0


def seen_and_heard(batch: Microbatch) -> torch.Tensor:
    """[R] float: 1 where a row has both an image or clip and a sound."""
    seen = batch.image_slots_RK[:, 0] >= 0
    if batch.clip_slots_R is not None:
        seen = seen | (batch.clip_slots_R >= 0)
    return (seen & has_sound(batch)).float()


def _vision_rows(
    vision: SwinConfig, memory: torch.Tensor, context: ForwardContext
) -> tuple[torch.Tensor, torch.Tensor]:
    """[R, Mv, C] of `vision_memory`, and [R, Mv] bool."""
    index, seen_RM = context.derived(
        vision_positions, vision.tokens_per_clip(1), vision_length(vision, context.batch.plan)
    )
    return memory.index_select(0, index).view(*seen_RM.shape, -1), seen_RM


def _audio_rows(memory: torch.Tensor, context: ForwardContext) -> torch.Tensor:
    return memory.index_select(0, context.batch.sound_slots_RJ[:, 0].clamp(min=0))


# -------------------------------------------------------------------------------------------------- contrastive


def _contrastive_nodes(config: AVTConfig, settings: LayerSettings) -> list[Node]:
    def vision_mean(memory: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        return masked_mean(*_vision_rows(config.vision, memory, context))

    def audio_mean(memory: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        return _audio_rows(memory.mean(dim=1), context)

    heads = []
    for kind, width, pool in (
        ("vision", config.vision.hidden_size, vision_mean),
        ("audio", config.audio.hidden_size, audio_mean),
    ):
        args = (settings, width, config.contrastive, pool)
        heads.append(embedding_node(f"contrastive.{kind}", f"{kind}_memory", f"{kind}_embedding", *args))
    return [*heads, scale_node(settings, config.contrastive)]


# ------------------------------------------------------------------------------------------------------- fusion


def _fusion_shape(config: AVTConfig) -> StackShape:
    fusion = config.fusion
    return StackShape(
        num_layers=fusion.num_layers,
        hidden_size=fusion.hidden_size,
        num_attention_heads=fusion.num_attention_heads,
        num_query_groups=fusion.num_query_groups,
        ffn_hidden_size=fusion.ffn_hidden_size,
        normalization="RMSNorm",
        norm_epsilon=fusion.layernorm_epsilon,
        activation=functional.silu,
        bias=False,
        gated=True,
        init_std=config.init_std,
    )


class FusionInputs(nn.Module):
    """Encoder outputs, one memory a row, projected to the fusion's width; whole on every process."""

    def __init__(self, config: AVTConfig, settings: LayerSettings) -> None:
        super().__init__()
        self._vision, width = config.vision, config.fusion.hidden_size
        self.vision_projection = empty_parameter(width, config.vision.hidden_size, dtype=settings.dtype)
        self.audio_projection = empty_parameter(width, config.audio.hidden_size, dtype=settings.dtype)

    def forward(
        self, vision_memory: torch.Tensor, audio_memory: torch.Tensor, context: ForwardContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """-> [R, Mv, H], [R, Ma, H]."""
        vision, _ = _vision_rows(self._vision, functional.linear(vision_memory, self.vision_projection), context)
        return vision, _audio_rows(functional.linear(audio_memory, self.audio_projection), context)


class FusionLayer(nn.Module):
    """Each modality's layer reads the other modality as it was before."""

    def __init__(self, vision: nn.Module, audio: nn.Module) -> None:
        super().__init__()
        self.vision, self.audio = vision, audio

    def forward(
        self, vision_rows: torch.Tensor, audio_rows: torch.Tensor, context: ForwardContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[R, Mv, H], [R, Ma, H] -> the same."""
        return self.vision(vision_rows, audio_rows, context), self.audio(audio_rows, vision_rows, context)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Those of both layers."""
        entries = self.vision.sharded_state_dict(f"{prefix}vision.", sharded_offsets, metadata)
        return {**entries, **self.audio.sharded_state_dict(f"{prefix}audio.", sharded_offsets, metadata)}


class FusionOutput(nn.Module):
    """Both modalities as one memory, normalised and projected to the decoder's width; whole on every process."""

    def __init__(self, config: AVTConfig, settings: LayerSettings) -> None:
        super().__init__()
        shape = _fusion_shape(config)
        self.final_layernorm = backend_of(settings).norm(
            layer_config(settings, shape, sharded=False), shape.hidden_size
        )
        self.projection = empty_parameter(config.decoder.hidden_size, shape.hidden_size, dtype=settings.dtype)

    def forward(
        self, vision_rows: torch.Tensor, audio_rows: torch.Tensor, context: ForwardContext
    ) -> torch.Tensor:
        """-> [R, Mv + Ma, decoder's width]."""
        both = self.final_layernorm(torch.cat((vision_rows, audio_rows), dim=1))
        return functional.linear(both, self.projection)


def _fusion_nodes(config: AVTConfig, settings: LayerSettings) -> list[Node]:
    shape, std, sizes = _fusion_shape(config), config.init_std, settings.sizes
    sounds, hidden, width = config.audio.tokens_per_sound, shape.hidden_size, config.decoder.hidden_size
    vision_rows = Stream("vision_rows", lambda plan: (plan.num_rows, vision_length(config.vision, plan), hidden))
    audio_rows = Stream("audio_rows", lambda plan: (plan.num_rows, sounds, hidden))
    memory = Stream(
        "memory", lambda plan: (plan.num_rows, vision_length(config.vision, plan) + sounds, width)
    )

    def seen(batch: Microbatch) -> tuple[None, torch.Tensor]:
        return None, _seen_positions(config.vision, batch)

    def heard(batch: Microbatch) -> tuple[None, torch.Tensor]:
        return None, has_sound(batch)

    def vision_mask(batch: Microbatch) -> AttentionPlan:
        """Positions beyond an image's, in a row shorter than a clip, are hidden."""
        hidden_RM = ~_seen_positions(config.vision, batch)
        mask = torch.zeros(hidden_RM.shape, dtype=settings.dtype, device=hidden_RM.device)
        mask = mask.masked_fill(hidden_RM & ~hidden_RM.all(dim=1, keepdim=True), float("-inf"))
        return AttentionPlan(hidden_RM.shape[0], mask=mask[:, None, None])

    def vision_plan(hidden_states: torch.Tensor, context: ForwardContext) -> AttentionPlan:
        return context.derived(vision_mask)

    def audio_plan(hidden_states: torch.Tensor, context: ForwardContext) -> AttentionPlan:
        return AttentionPlan(rows=hidden_states.shape[0])

    def layer(index: int) -> nn.Module:
        def modality(view: ViewMaker, plan: Callable) -> nn.Module:
            return memory_layer(settings, shape, index + 1, view, memory_width=hidden, sharded=False, plan=plan)

        return FusionLayer(modality(heard, vision_plan), modality(seen, audio_plan))

    def layer_cost_of(plan: MicrobatchPlan) -> NodeCost:
        lengths = (vision_length(config.vision, plan), sounds)
        vision, audio = (
            memory_layer_cost(
                shape,
                sizes,
                rows=plan.num_rows,
                length=own,
                memories=plan.num_rows,
                memory_length=other,
                memory_width=hidden,
                sharded=False,
            )
            for own, other in (lengths, lengths[::-1])
        )
        return vision + audio

    def projection_cost(positions: int, inputs: int, outputs: int) -> NodeCost:
        everywhere = positions * copies(sizes, sharded=False)
        return NodeCost(inputs * outputs, 2.0 * everywhere * inputs * outputs, 2.0 * everywhere * inputs)

    def inputs_cost(plan: MicrobatchPlan) -> NodeCost:
        seen = plan.num_images * config.vision.tokens_per_clip(1)
        seen += plan.num_clips * config.vision.tokens_per_clip(plan.clip_frames)
        vision = projection_cost(seen, config.vision.hidden_size, hidden)
        return vision + projection_cost(plan.num_sounds * sounds, config.audio.hidden_size, hidden)

    def output_cost(plan: MicrobatchPlan) -> NodeCost:
        positions = plan.num_rows * (vision_length(config.vision, plan) + sounds)
        norm = NodeCost(hidden, 0.0, 2.0 * positions * hidden * copies(sizes, sharded=False))
        return norm + projection_cost(positions, hidden, width)

    rows = (vision_rows, audio_rows)
    nodes = [
        Node(
            "fusion.inputs",
            lambda: describe(FusionInputs(config, settings), init_std=std),
            ("vision_memory", "audio_memory"),
            rows,
            inputs_cost,
        )
    ]
    for index in range(config.fusion.num_layers):
        name, reads = f"fusion.layers.{index}", ("vision_rows", "audio_rows")
        nodes.append(Node(name, partial(layer, index), reads, rows, layer_cost_of, recomputable=True))
    nodes.append(
        Node(
            "fusion.output",
            lambda: describe(FusionOutput(config, settings), init_std=std),
            ("vision_rows", "audio_rows"),
            (memory,),
            output_cost,
        )
    )
    return nodes


# ------------------------------------------------------------------------------------------------------ decoder


def _decoder_nodes(config: AVTConfig, settings: LayerSettings, masked: bool) -> list[Node]:
    decoder = DecoderNodes(config.decoder, settings, config.init_std, lambda plan: plan.task != "masked_lm")
    sounds, width = config.audio.tokens_per_sound, config.decoder.hidden_size

    def tokens(batch: Microbatch) -> torch.Tensor:
        return batch.masked_tokens_RT if batch.plan.task == "masked_lm" else batch.tokens_RT

    def fused(batch: Microbatch) -> tuple[None, torch.Tensor]:
        heard = has_sound(batch)[:, None].expand(-1, sounds)
        return None, torch.cat((_seen_positions(config.vision, batch), heard), dim=1)

    def cost(plan: MicrobatchPlan) -> NodeCost:
        return memory_layer_cost(
            decoder.shape,
            settings.sizes,
            rows=plan.num_rows,
            length=plan.row_length,
            memories=plan.num_rows,
            memory_length=vision_length(config.vision, plan) + sounds,
            memory_width=width,
            sharded=True,
        )

    def layer(index: int) -> Node:
        kind = {"memory_width": width, "sharded": True, "plan": decoder.plan}
        build = partial(memory_layer, settings, decoder.shape, index + 1, fused, **kind)
        name = f"decoder.layers.{index}"
        return Node(name, build, ("text", "memory"), (decoder.text,), cost, recomputable=True)

    embedding = decoder.embedding(tokens, frozenset({"tokens_RT"} | ({"masked_tokens_RT"} if masked else set())))
    return [embedding, *(layer(index) for index in range(config.decoder.num_layers)), decoder.output()]
