"""AVT-33B: Swin and Conformer encoders, fused by cross-attention, before a decoder that reads the fused memory.

Streams: `vision_memory` (flat: images, then clips) and `audio_memory` [A, N, C], from the encoders; their pooled
embeddings for the audio-visual contrastive loss; `vision_rows` and `audio_rows`, one memory a row at the fusion's
width; `memory` [R, Mv + Ma, H], both after fusion, at the decoder's width; `text`, which every decoder layer rewrites.
Microbatches of task `masked_lm` read masked tokens and see both sides, those of `generation` are causal: the weights
are the same (UniLM, arXiv:1905.03197).

Shape suffixes: R rows, Mv, Ma memory positions of a row.
"""

from __future__ import annotations

import torch

from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Graph, Node
from megatron_mm.models.layers.memory_attention import MemoryLayerKind
from megatron_mm.models.layers.pooling import masked_mean
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.models.layers.transformer import rows_of_text
from megatron_mm.models.names import LLAMA
from megatron_mm.objectives.causal_lm import causal_lm_loss
from megatron_mm.objectives.contrastive import contrastive_loss
from megatron_mm.objectives.masked_lm import masked_lm_loss
from megatron_mm.parts.conformer.nodes import conformer_nodes
from megatron_mm.parts.contrastive.nodes import embedding_node, scale_node
from megatron_mm.parts.decoder.nodes import DecoderNodes
from megatron_mm.parts.swin.nodes import swin_nodes
from megatron_mm.systems.avt.fusion import CROSS_NAMES, fusion_nodes, memory_length
from megatron_mm.systems.avt.rows import has_sound, read_audio, read_vision, seen_and_heard, seen_positions
from megatron_mm.systems.avt.section import AVTConfig


def build_graph(config: AVTConfig, settings: LayerSettings) -> Graph:
    """The graph; what an objective of weight zero alone would need is left out."""
    losses, kind = [], settings.performance.cross_entropy
    nodes = swin_nodes(config.vision, settings, config.init_std)
    nodes += conformer_nodes(config.audio, settings, config.init_std)
    if config.contrasts:
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
    if config.reads_text:
        nodes += fusion_nodes(config, settings)
        nodes += _decoder_nodes(config, settings)
    if config.predicts_masked:
        tasks = frozenset({"masked_lm"})
        losses.append(masked_lm_loss(weight=config.masked_lm_weight, tasks=tasks, kind=kind))
    if config.generates:
        tasks = frozenset({"generation"})
        losses.append(causal_lm_loss("generation", weight=config.generation_weight, tasks=tasks, kind=kind))
    return Graph(nodes, losses)


def _contrastive_nodes(config: AVTConfig, settings: LayerSettings) -> list[Node]:
    def vision_mean(memory: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        return masked_mean(*read_vision(config.vision, memory, context))

    def audio_mean(memory: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        return read_audio(memory.mean(dim=1), context)

    heads = []
    for kind, width, pool in (
        ("vision", config.vision.hidden_size, vision_mean),
        ("audio", config.audio.hidden_size, audio_mean),
    ):
        args = (settings, width, config.contrastive, pool)
        heads.append(embedding_node(kind, f"{kind}_memory", f"{kind}_embedding", *args))
    return [*heads, scale_node(settings, config.contrastive)]


def _decoder_nodes(config: AVTConfig, settings: LayerSettings) -> list[Node]:
    decoder = DecoderNodes(config.decoder, settings, config.init_std, lambda plan: plan.task != "masked_lm")
    sounds, width = config.audio.tokens_per_sound, config.decoder.hidden_size

    def tokens(batch: Microbatch) -> torch.Tensor:
        return batch.masked_tokens_RT if batch.plan.task == "masked_lm" else batch.tokens_RT

    def fused(batch: Microbatch) -> tuple[None, torch.Tensor]:
        heard = has_sound(batch)[:, None].expand(-1, sounds)
        return None, torch.cat((seen_positions(config.vision, batch), heard), dim=1)

    def memories(plan: MicrobatchPlan) -> list[tuple[int, int]]:
        return [(plan.num_rows, memory_length(config, plan))]

    def layer(index: int) -> Node:
        reading = (fused, rows_of_text, memories, width, LLAMA, CROSS_NAMES)
        options = {"sharded": True, "self_plan": decoder.plan, "is_causal": decoder.is_causal}
        kind = MemoryLayerKind(settings, decoder.shape, index + 1, *reading, **options)
        name, place = f"decoder.layers.{index}", f"model.layers.{index}"
        return Node(name, kind, ("text", "memory"), (decoder.text,), place, recomputable=True)

    read = {"tokens_RT", "masked_tokens_RT"} if config.predicts_masked else {"tokens_RT"}
    embedding = decoder.embedding(tokens, frozenset(read))
    return [embedding, *(layer(index) for index in range(config.decoder.num_layers)), decoder.output()]
