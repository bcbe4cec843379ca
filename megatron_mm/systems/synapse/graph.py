"""Synapse: a causal decoder that reads image, video and audio memory through gated cross-attention.

Streams: `image_memory` and `audio_memory`, written by the towers at their own widths; `text` [R·T, 1, H], rewritten by
each decoder layer and, before every `cross_attention.every`-th of them, by a cross-attention sublayer that reads both
memories; `logits`, which the loss reads in the chunk that wrote them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import Graph, Node, NodeCost
from megatron_mm.models.layers.costs import cross_cost
from megatron_mm.models.layers.cross_attention import gated_cross_attention
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.objectives.causal_lm import causal_lm_loss
from megatron_mm.parts.clip.nodes import vision_nodes
from megatron_mm.parts.decoder.nodes import DecoderNodes
from megatron_mm.parts.whisper.nodes import audio_nodes
from megatron_mm.systems.synapse.section import SynapseConfig


def build_graph(config: SynapseConfig, settings: LayerSettings) -> Graph:
    """The graph of Synapse; its nodes ask for process groups only when they are built."""
    cross, vision, audio = config.cross_attention, config.vision, config.audio
    decoder = DecoderNodes(config.decoder, settings, config.init_std)
    across = replace(decoder.shape, num_query_groups=cross.num_query_groups)

    def cross_layer_cost(plan: MicrobatchPlan) -> NodeCost:
        images = (vision.hidden_size, plan.num_images, vision.tokens_per_image, plan.image_slots)
        sounds = (audio.hidden_size, plan.num_sounds, audio.tokens_per_sound, plan.sound_slots)
        return cross_cost(
            across,
            settings.sizes,
            rows=plan.num_rows,
            length=plan.row_length,
            memories=(images, sounds),
            qk_layernorm=cross.qk_layernorm,
        )

    def cross_layer(number: int) -> Node:
        build = partial(
            gated_cross_attention,
            settings,
            across,
            gate_init=cross.gate_init,
            image_width=vision.hidden_size,
            sound_width=audio.hidden_size,
            image_tokens=vision.tokens_per_image,
            sound_tokens=audio.tokens_per_sound,
            qk_layernorm=cross.qk_layernorm,
        )
        reads = ("text", "image_memory", "audio_memory")
        name = f"decoder.cross_layers.{number}"
        return Node(name, build, reads, (decoder.text,), cross_layer_cost, recomputable=True)

    nodes = vision_nodes(vision, settings, config.init_std) + audio_nodes(audio, settings, config.init_std)
    nodes.append(decoder.embedding())
    for index in range(config.decoder.num_layers):
        if index % cross.every == 0:
            nodes.append(cross_layer(index // cross.every))
        nodes.append(decoder.layer(index))
    nodes.append(decoder.output())
    return Graph(nodes, [causal_lm_loss(kind=settings.performance.cross_entropy)])
