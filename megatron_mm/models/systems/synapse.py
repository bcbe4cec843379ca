"""Synapse: a causal decoder that reads image, video and audio memory through gated cross-attention.

Streams: `image_memory` and `audio_memory`, written by the towers at their own widths; `text` [R·T, 1, H], rewritten by
each decoder layer and, before every `cross_attention.every`-th of them, by a cross-attention sublayer that reads both
memories; `logits`, which the loss reads in the chunk that wrote them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch.nn import functional

from megatron_mm.config.systems import SynapseConfig
from megatron_mm.data.microbatch import MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Graph, Node, NodeCost, Stream
from megatron_mm.models.layers.attention import AttentionPlan, text_plan
from megatron_mm.models.layers.costs import cross_cost, embedding_cost, head_cost, layer_cost
from megatron_mm.models.layers.cross_attention import gated_cross_attention
from megatron_mm.models.layers.settings import LayerSettings, StackShape
from megatron_mm.models.layers.text_ends import language_head, token_embedding
from megatron_mm.models.layers.transformer import backend_of, stack_layer
from megatron_mm.models.towers.audio import audio_nodes
from megatron_mm.models.towers.vision import vision_nodes
from megatron_mm.objectives.causal_lm import causal_lm_loss


def decoder_shape(config: SynapseConfig) -> StackShape:
    """The decoder as a stack of layers."""
    decoder = config.decoder
    return StackShape(
        num_layers=decoder.num_layers,
        hidden_size=decoder.hidden_size,
        num_attention_heads=decoder.num_attention_heads,
        num_query_groups=decoder.num_query_groups,
        ffn_hidden_size=decoder.ffn_hidden_size,
        normalization="RMSNorm",
        norm_epsilon=decoder.layernorm_epsilon,
        activation=functional.silu,
        bias=False,
        gated=True,
        init_std=config.init_std,
    )


def cross_shape(config: SynapseConfig) -> StackShape:
    """The decoder's shape with the key-value heads of cross-attention."""
    return replace(decoder_shape(config), num_query_groups=config.cross_attention.num_query_groups)


def build_graph(config: SynapseConfig, settings: LayerSettings) -> Graph:
    """The graph of Synapse; its nodes ask for process groups only when they are built."""
    decoder, cross, vision, audio = config.decoder, config.cross_attention, config.vision, config.audio
    shape, across = decoder_shape(config), cross_shape(config)
    text = Stream("text", lambda plan: (plan.num_rows * plan.row_length, 1, decoder.hidden_size), "sequence")
    logits = Stream("logits", lambda plan: (plan.num_rows * plan.row_length, 1, decoder.vocab_size), "sequence")

    def plan_of(hidden: torch.Tensor, context: ForwardContext) -> AttentionPlan:
        return text_plan(
            context,
            head_dim=shape.head_dim,
            rotary_base=decoder.rotary_base,
            dtype=settings.dtype,
            packed=backend_of(settings).PACKED,
        )

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

    nodes = vision_nodes(vision, settings, config.init_std) + audio_nodes(audio, settings, config.init_std)
    nodes.append(
        Node(
            "decoder.embedding",
            partial(token_embedding, settings, shape, decoder.vocab_size),
            (),
            (text,),
            lambda plan: embedding_cost(shape, decoder.vocab_size, plan.num_rows * plan.row_length, settings.sizes),
            frozenset({"tokens_RT"}),
        )
    )
    for index in range(decoder.num_layers):
        if index % cross.every == 0:
            nodes.append(
                Node(
                    f"decoder.cross_layers.{index // cross.every}",
                    partial(
                        gated_cross_attention,
                        settings,
                        across,
                        gate_init=cross.gate_init,
                        image_width=vision.hidden_size,
                        sound_width=audio.hidden_size,
                        image_tokens=vision.tokens_per_image,
                        sound_tokens=audio.tokens_per_sound,
                        qk_layernorm=cross.qk_layernorm,
                    ),
                    ("text", "image_memory", "audio_memory"),
                    (text,),
                    cross_layer_cost,
                    recomputable=True,
                )
            )
        nodes.append(
            Node(
                f"decoder.layers.{index}",
                partial(stack_layer, settings, shape, index + 1, plan_of, text=True),
                ("text",),
                (text,),
                lambda plan: layer_cost(shape, plan.num_rows, plan.row_length, settings.sizes, text=True),
                recomputable=True,
            )
        )
    nodes.append(
        Node(
            "decoder.output",
            partial(language_head, settings, shape, decoder.vocab_size),
            ("text",),
            (logits,),
            lambda plan: head_cost(shape, decoder.vocab_size, plan.num_rows * plan.row_length, settings.sizes),
        )
    )
    return Graph(nodes, [causal_lm_loss()])
