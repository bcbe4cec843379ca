"""VLM-14B: an MAE vision tower, and a causal decoder whose upper half reads it through gated blocks.

Phase `mae`: the tower sees a quarter of the patches, a light decoder the rest; the decoder is dropped afterwards.
Phase `joint`: `image_memory` from the tower; `text` through self-attention layers, from the last of which below any
cross-attention the text embedding is taken (later it would have seen the image), then blocks of one gated
cross-attention layer and `every` self-attention layers; contrastive and causal LM losses.
"""

from __future__ import annotations

from functools import partial

from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import Graph, Node
from megatron_mm.models.layers.memory_attention import (
    MemoryLayerKind,
    MemoryLayerNames,
)
from megatron_mm.models.layers.pooling import last_state
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.models.layers.transformer import rows_of_text
from megatron_mm.models.names import LLAMA
from megatron_mm.objectives.causal_lm import causal_lm_loss
from megatron_mm.objectives.contrastive import image_text_loss
from megatron_mm.objectives.mae import mae_loss
from megatron_mm.parts.contrastive.nodes import embedding_node, scale_node
from megatron_mm.parts.decoder.nodes import DecoderNodes
from megatron_mm.parts.vit.mae import mae_nodes
from megatron_mm.parts.vit.nodes import vit_nodes
from megatron_mm.parts.vit.rows import mean_patch, row_images
from megatron_mm.systems.vlm.section import VLMConfig


def build_graph(config: VLMConfig, settings: LayerSettings) -> Graph:
    """The graph of a phase."""
    vision, std = config.vision, config.init_std
    if not config.reads_text:
        nodes = vit_nodes(vision, settings, std, full=False, masked=config.mae)
        nodes += mae_nodes(vision, config.mae, settings, std)
        return Graph(nodes, [mae_loss(vision, config.mae)])
    decoder = DecoderNodes(config.decoder, settings, std)
    nodes = vit_nodes(vision, settings, std)
    losses = []
    if config.contrasts:
        args = (settings, vision.hidden_size, config.contrastive, mean_patch)
        nodes.append(embedding_node("image", "image_memory", "image_embedding", *args))
        losses.append(image_text_loss(config.contrastive, config.contrastive_weight))
    nodes.append(decoder.embedding())
    cross = config.cross_attention
    for index in range(config.decoder.num_layers if config.generates else cross.first_layer):
        if index >= cross.first_layer and (index - cross.first_layer) % cross.every == 0:
            nodes.append(_gated_block(config, settings, decoder, (index - cross.first_layer) // cross.every))
        nodes.append(decoder.layer(index))
        if config.contrasts and index + 1 == cross.first_layer:
            pool = partial(last_state, sequence_parallel=settings.sizes.sequence_parallel)
            args = (settings, decoder.shape.hidden_size, config.contrastive, pool, decoder.shape)
            nodes.append(embedding_node("text", "text", "text_embedding", *args, sharded=True))
    if config.contrasts:
        nodes.append(scale_node(settings, config.contrastive))
    if config.generates:
        nodes.append(decoder.output())
        losses.append(causal_lm_loss(weight=config.causal_lm_weight, kind=settings.performance.cross_entropy))
    return Graph(nodes, losses)


_NAMES = MemoryLayerNames("input_layernorm", "cross_attn", "cross_attn_gate", "mlp_gate")


def _gated_block(config: VLMConfig, settings: LayerSettings, decoder: DecoderNodes, number: int) -> Node:
    cross, vision = config.cross_attention, config.vision

    def images(plan: MicrobatchPlan) -> list[tuple[int, int]]:
        return [(plan.num_images, vision.tokens_per_image)]

    kind = MemoryLayerKind(
        settings,
        decoder.shape,
        number + 1,
        row_images,
        rows_of_text,
        images,
        vision.hidden_size,
        LLAMA,
        _NAMES,
        sharded=True,
        qk_layernorm=cross.qk_layernorm,
        gate_init=cross.gate_init,
    )
    at, reads = f"cross_layers.{number}", ("text", "image_memory")
    return Node(f"decoder.{at}", kind, reads, (decoder.text,), f"model.{at}", recomputable=True)
