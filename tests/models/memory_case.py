"""Every kind of layer that reads a memory, bidirectional text and pooled states, in one graph that ends in losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import Graph, Kind, Node, Stream
from megatron_mm.models.layers.attention import causal_plan
from megatron_mm.models.layers.memory_attention import memory_layer, memory_layer_cost
from megatron_mm.models.layers.pooling import last_row_state, last_state
from megatron_mm.models.layers.settings import LayerSettings, StackShape
from megatron_mm.objectives.causal_lm import causal_lm_loss
from megatron_mm.objectives.contrastive import image_text_loss
from megatron_mm.parts.contrastive.nodes import embedding_node, scale_node
from megatron_mm.parts.contrastive.section import ContrastiveConfig
from megatron_mm.parts.decoder.nodes import DecoderNodes
from megatron_mm.parts.decoder.section import DecoderConfig
from megatron_mm.parts.vit.rows import image_of_row, row_images
from tests.objectives.cases import Case, rows, table_node

LENGTH, MEMORY, MEMORY_WIDTH = 8, 5, 24
DECODER = DecoderConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=48, vocab_size=64
)
#: A tower's layers: LayerNorm, GELU, biases.
TOWER = StackShape(2, 32, 4, 4, 48, "LayerNorm", 1e-5, partial(torch.nn.functional.gelu, approximate="tanh"))


def batch_of(numbers: Sequence[int]) -> Microbatch:
    """Rows of 2 to 8 tokens; every third sample has no image."""
    tokens = torch.stack([torch.randint(0, 64, (LENGTH + 1,), generator=_generator(number)) for number in numbers])
    batch = rows(numbers, {number for number in numbers if number % 3 != 1}, tokens[:, :-1])
    batch.labels_RT = tokens[:, 1:]
    batch.loss_mask_RT = (batch.document_ids_RT >= 0).float()
    return batch


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def half_seen(batch: Microbatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a row's image as many positions as the row has tokens, at most all."""
    documents = batch.document_ids_RT
    seen = torch.arange(MEMORY, device=documents.device) < (documents >= 0).sum(dim=1, keepdim=True)
    return image_of_row(batch), seen & (batch.image_slots_RK >= 0)


def memory_node(settings: LayerSettings, shape: StackShape, stream: Stream, name: str, view, **kind) -> Node:
    """A layer on `stream` that reads `image_memory`."""
    cost_kind = {"sharded": kind["sharded"], "qk_layernorm": kind.get("qk_layernorm", False)}

    def cost(plan: MicrobatchPlan):
        return memory_layer_cost(
            shape,
            settings,
            rows=plan.num_rows,
            length=plan.row_length,
            memories=plan.num_images,
            memory_length=MEMORY,
            memory_width=MEMORY_WIDTH,
            cross_query_groups=kind.get("cross_query_groups"),
            gated="gate_init" in kind,
            **cost_kind,
        )

    build = partial(memory_layer, settings, shape, 1, view, memory_width=MEMORY_WIDTH, **kind)
    return Node(name, Kind(build, cost), (stream.name, "image_memory"), (stream,), recomputable=True)


def named(name: str, node: Node) -> Node:
    """The node under another name: initial weights are keyed by it, and these are well conditioned."""
    return replace(node, name=name)


def every_kind(settings: LayerSettings) -> Case:
    """Text and a tower read the memory, and both are pooled."""
    decoder = DecoderNodes(DECODER, settings, 0.3, lambda plan: False)
    part = ContrastiveConfig(embedding_size=8, temperature=0.5)
    states = Stream("states", lambda plan: (plan.num_rows, plan.row_length, 32), dtype=torch.float32)
    gates = {"sharded": True, "qk_layernorm": True, "gate_init": 0.5, "cross_query_groups": 4}
    shared = (settings, 32, part)
    text_pool = partial(last_state, sequence_parallel=settings.sizes.sequence_parallel)
    nodes = [
        table_node("image_memory", MEMORY, MEMORY_WIDTH),
        decoder.embedding(),
        memory_node(settings, decoder.shape, decoder.text, "gated", row_images, **gates),
        memory_node(settings, decoder.shape, decoder.text, "ungated", half_seen, sharded=True, plan=decoder.plan),
        named("pool.text", embedding_node("text", "text", "text_embedding", *shared, text_pool, decoder.shape)),
        decoder.layer(0),
        decoder.output(),
        table_node("states", LENGTH, 32),
        memory_node(settings, TOWER, states, "tower", half_seen, sharded=False, plan=causal_plan),
        named("pool.states", embedding_node("image", "states", "image_embedding", *shared, last_row_state, TOWER)),
        scale_node(settings, part),
    ]
    return Graph(nodes, [causal_lm_loss(), image_text_loss(part, 0.5)]), batch_of
