"""The dual encoder with late fusion: an MAE vision tower, a GPT-2-like text encoder, cross-attention above, tied head.

Phase `mae`: masked autoencoding of the tower. Phase `joint`: contrastive loss on the two encoders' outputs, captions
and answers through the fusion layers (causal, reading the image), and masked autoencoding beside them if it has weight.
Streams: `image_memory` [I, 1 + P, C]; `text` [R, T, C], rewritten by encoder and fusion.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import Graph, Node, Stream
from megatron_mm.models.layers.attention import causal_plan
from megatron_mm.models.layers.memory_attention import (
    MemoryLayerKind,
    MemoryLayerNames,
)
from megatron_mm.models.layers.pooling import last_row_state
from megatron_mm.models.layers.settings import LayerSettings, StackShape
from megatron_mm.models.layers.text_ends import HeadNames, LanguageHeadKind
from megatron_mm.models.layers.transformer import causal, rows_of_text
from megatron_mm.models.names import OPT
from megatron_mm.objectives.causal_lm import causal_lm_loss
from megatron_mm.objectives.contrastive import image_text_loss
from megatron_mm.objectives.mae import mae_loss
from megatron_mm.parts.contrastive.nodes import embedding_node, scale_node
from megatron_mm.parts.text_encoder.nodes import text_nodes, text_shape
from megatron_mm.parts.vit.mae import mae_nodes
from megatron_mm.parts.vit.nodes import vit_nodes
from megatron_mm.parts.vit.rows import mean_patch, row_images
from megatron_mm.systems.dual_encoder.section import DualEncoderConfig

EMBEDDING = "text.embedding.word_embeddings.weight"


def build_graph(config: DualEncoderConfig, settings: LayerSettings) -> Graph:
    """The graph of a phase."""
    vision, std = config.vision, config.init_std
    if not config.reads_text:
        nodes = vit_nodes(vision, settings, std, full=False, masked=config.mae)
        nodes += mae_nodes(vision, config.mae, settings, std)
        return Graph(nodes, [mae_loss(vision, config.mae)])
    losses = []
    masked = config.mae if config.reconstructs else None
    nodes = vit_nodes(vision, settings, std, masked=masked)
    if masked is not None:
        nodes += mae_nodes(vision, masked, settings, std)
        losses.append(mae_loss(vision, masked, config.mae_weight))
    nodes += text_nodes(config.text, settings, std)
    text = text_shape(config.text, std)
    if config.contrasts:
        args = (settings, vision.hidden_size, config.contrastive, mean_patch)
        nodes.append(embedding_node("image", "image_memory", "image_embedding", *args))
        args = (settings, text.hidden_size, config.contrastive, last_row_state)
        nodes.append(embedding_node("text", "text", "text_embedding", *args))
        nodes.append(scale_node(settings, config.contrastive))
        losses.append(image_text_loss(config.contrastive, config.contrastive_weight))
    if config.generates:
        nodes += _fusion(config, settings, text)
        kind = settings.performance.cross_entropy
        losses.append(causal_lm_loss(weight=config.causal_lm_weight, sharded=False, kind=kind))
    return Graph(nodes, losses)


_NAMES = MemoryLayerNames("cross_attn_layer_norm", "cross_attn")


def _fusion(config: DualEncoderConfig, settings: LayerSettings, text: StackShape) -> list[Node]:
    fusion, vision = config.fusion, config.vision
    shape = replace(
        text,
        num_layers=fusion.num_layers,
        num_attention_heads=fusion.num_attention_heads,
        num_query_groups=fusion.num_attention_heads,
        ffn_hidden_size=fusion.ffn_hidden_size,
    )
    stream = Stream("text", lambda plan: (plan.num_rows, plan.row_length, text.hidden_size))
    logits = Stream("logits", lambda plan: (plan.num_rows * plan.row_length, 1, config.text.vocab_size))

    def images(plan: MicrobatchPlan) -> list[tuple[int, int]]:
        return [(plan.num_images, vision.tokens_per_image)]

    def layer(index: int) -> Node:
        reading = (row_images, rows_of_text, images, vision.hidden_size, OPT, _NAMES)
        kind = MemoryLayerKind(settings, shape, index + 1, *reading, self_plan=causal_plan, is_causal=causal)
        name = f"fusion.layers.{index}"
        return Node(name, kind, ("text", "image_memory"), (stream,), name, recomputable=True)

    names = HeadNames("fusion.final_layer_norm")
    head = LanguageHeadKind(settings, shape, config.text.vocab_size, names, sharded=False)
    output = Node("fusion.output", head, ("text",), (logits,), ties={"output_layer.weight": EMBEDDING})
    return [*(layer(index) for index in range(fusion.num_layers)), output]
