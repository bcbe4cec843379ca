"""Synapse: a causal decoder that reads image, video and audio memory through gated cross-attention.

Streams: `image_memory` and `audio_memory`, written by the towers at their own widths; `text` [R·T, 1, H], rewritten by
each decoder layer and, before every `cross_attention.every`-th of them, by a cross-attention sublayer that reads both
memories; `logits`, which the loss reads in the chunk that wrote them.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_mm.models.graph import Graph, Node
from megatron_mm.models.layers.cross_attention import GatedCrossAttentionKind, MediaMemory
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.objectives.causal_lm import causal_lm_loss
from megatron_mm.parts.clip.nodes import vision_nodes
from megatron_mm.parts.decoder.nodes import DecoderNodes
from megatron_mm.parts.whisper.nodes import audio_nodes
from megatron_mm.systems.synapse.section import SynapseConfig


def build_graph(config: SynapseConfig, settings: LayerSettings) -> Graph:
    """The graph of Synapse; its nodes ask for process groups only when they are built."""
    cross, vision, audio, std = config.cross_attention, config.vision, config.audio, config.init_std
    decoder = DecoderNodes(config.decoder, settings, std)
    across = GatedCrossAttentionKind(
        settings,
        replace(decoder.shape, num_query_groups=cross.num_query_groups),
        (
            MediaMemory("image", "image", vision.hidden_size, vision.tokens_per_image),
            MediaMemory("audio", "sound", audio.hidden_size, audio.tokens_per_sound),
        ),
        qk_layernorm=cross.qk_layernorm,
        gate_init=cross.gate_init,
    )
    reads = ("text", "image_memory", "audio_memory")

    def cross_layer(number: int) -> Node:
        at = f"cross_layers.{number}"
        return Node(f"decoder.{at}", across, reads, (decoder.text,), f"model.{at}", recomputable=True)

    nodes = vision_nodes(vision, settings, std, "model.vision_tower")
    nodes += audio_nodes(audio, settings, std, "model.audio_tower")
    nodes.append(decoder.embedding())
    for index in range(config.decoder.num_layers):
        if index % cross.every == 0:
            nodes.append(cross_layer(index // cross.every))
        nodes.append(decoder.layer(index))
    nodes.append(decoder.output())
    return Graph(nodes, [causal_lm_loss(kind=settings.performance.cross_entropy)])
