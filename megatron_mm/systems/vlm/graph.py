"""VLM-14B: an MAE vision tower, and a causal decoder whose upper half reads it through gated blocks.

Phase `mae`: the tower sees a quarter of the patches, a light decoder the rest; the decoder is dropped afterwards.
Phase `joint`: `image_memory` from the tower; `text` through self-attention layers, from the last of which below any
cross-attention the text embedding is taken (later it would have seen the image), then blocks of one gated
cross-attention layer and `every` self-attention layers; contrastive and causal LM losses.
"""

from __future__ import annotations

from functools import partial

from megatron_mm.models.graph import Graph, Node, NodeCost
from megatron_mm.models.layers.memory_attention import memory_layer, memory_layer_cost
from megatron_mm.models.layers.pooling import last_state
from megatron_mm.models.layers.settings import LayerSettings
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
    if config.phase == "mae":
        nodes = vit_nodes(config.vision, settings, config.init_std, full=False, masked=config.mae)
        nodes += mae_nodes(config.vision, config.mae, settings, config.init_std)
        return Graph(nodes, [mae_loss(config.vision, config.mae)])
    decoder = DecoderNodes(config.decoder, settings, config.init_std)
    contrasts, speaks = config.contrastive_weight > 0, config.causal_lm_weight > 0
    nodes = vit_nodes(config.vision, settings, config.init_std)
    losses = []
    if contrasts:
        nodes.append(
            embedding_node(
                "contrastive.image",
                "image_memory",
                "image_embedding",
                settings,
                config.vision.hidden_size,
                config.contrastive,
                mean_patch,
            )
        )
        losses.append(image_text_loss(config.contrastive, config.contrastive_weight))
    nodes.append(decoder.embedding())
    cross = config.cross_attention
    for index in range(config.decoder.num_layers if speaks else cross.first_layer):
        if index >= cross.first_layer and (index - cross.first_layer) % cross.every == 0:
            nodes.append(_gated_block(config, settings, decoder, (index - cross.first_layer) // cross.every))
        nodes.append(decoder.layer(index))
        if contrasts and index + 1 == cross.first_layer:
            nodes.append(_text_embedding(config, settings, decoder))
    if contrasts:
        nodes.append(scale_node(settings, config.contrastive))
    if speaks:
        nodes.append(decoder.output())
        losses.append(causal_lm_loss(weight=config.causal_lm_weight, kind=settings.performance.cross_entropy))
    return Graph(nodes, losses)


def _gated_block(config: VLMConfig, settings: LayerSettings, decoder: DecoderNodes, number: int) -> Node:
    cross, vision = config.cross_attention, config.vision
    build = partial(
        memory_layer,
        settings,
        decoder.shape,
        number + 1,
        row_images,
        memory_width=vision.hidden_size,
        sharded=True,
        qk_layernorm=cross.qk_layernorm,
        gate_init=cross.gate_init,
    )

    def cost(plan) -> NodeCost:
        return memory_layer_cost(
            decoder.shape,
            settings.sizes,
            rows=plan.num_rows,
            length=plan.row_length,
            memories=plan.num_images,
            memory_length=vision.tokens_per_image,
            memory_width=vision.hidden_size,
            sharded=True,
            qk_layernorm=cross.qk_layernorm,
            gated=True,
        )

    name, reads = f"decoder.cross_layers.{number}", ("text", "image_memory")
    return Node(name, build, reads, (decoder.text,), cost, recomputable=True)


def _text_embedding(config: VLMConfig, settings: LayerSettings, decoder: DecoderNodes) -> Node:
    return embedding_node(
        "contrastive.text",
        "text",
        "text_embedding",
        settings,
        decoder.shape.hidden_size,
        config.contrastive,
        partial(last_state, sequence_parallel=settings.sizes.sequence_parallel),
        norm=decoder.shape,
    )
