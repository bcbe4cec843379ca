"""PerceiverFusion-XL: ViT and Transformer-XL encoders, joined by a Perceiver whose output queries predict the text.

Streams: `image_memory` [I, 1 + P, C]; `text` [2R, T, C], clean rows and then masked ones; the two embeddings of the
contrastive loss; `pair_memory` [B, M + T, C], what the latents read: first each image with its masked text, for masked
language modelling, then three pairs a row for matching (its own, a wrong text, a wrong image); `latents` [B, L, D];
`query_states` [R, T, D], one query a token of the first R pairs; `logits`, through the tied text embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from megatron_mm.data.reading.microbatch import MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Graph, Kind, Node, NodeCost, Stream
from megatron_mm.models.layers.costs import StackWork, copies
from megatron_mm.models.layers.pooling import PooledHeadKind, PooledHeadNames, masked_mean
from megatron_mm.models.layers.settings import LayerSettings, StackShape
from megatron_mm.models.layers.text_ends import HeadNames, LanguageHeadKind
from megatron_mm.models.work import Collective, MatrixProduct, Work
from megatron_mm.objectives.contrastive import image_text_loss
from megatron_mm.objectives.masked_lm import masked_lm_loss
from megatron_mm.objectives.matching import matching_loss, matching_pairs
from megatron_mm.parts.contrastive.nodes import embedding_node, rows_of, scale_node
from megatron_mm.parts.perceiver.nodes import perceiver_nodes, query_node
from megatron_mm.parts.transformer_xl.nodes import transformer_xl_nodes
from megatron_mm.parts.vit.nodes import vit_nodes
from megatron_mm.parts.vit.rows import image_of_row, mean_patch, rows_with_image
from megatron_mm.systems.perceiver_fusion.section import PerceiverFusionConfig

EMBEDDING = "text.embedding.word_embeddings.weight"


def build_graph(config: PerceiverFusionConfig, settings: LayerSettings) -> Graph:
    """The graph; what an objective of weight zero alone would need is left out."""
    predicts, matches, contrasts = config.predicts_masked, config.matches, config.contrasts
    std, losses = config.init_std, []
    variants = ("tokens_RT", "masked_tokens_RT") if predicts else ("tokens_RT",)
    nodes = vit_nodes(config.vision, settings, std)
    nodes += transformer_xl_nodes(config.text, settings, std, variants)
    if contrasts or matches:  # matching looks for hard negatives by the embeddings
        args = (settings, config.vision.hidden_size, config.contrastive, mean_patch)
        nodes.append(embedding_node("image", "image_memory", "image_embedding", *args))
        args = (settings, config.text.hidden_size, config.contrastive, mean_token)
        nodes.append(embedding_node("text", "text", "text_embedding", *args))
        nodes.append(scale_node(settings, config.contrastive))
    if contrasts:
        losses.append(image_text_loss(config.contrastive, config.contrastive_weight))

    def pairs(plan: MicrobatchPlan) -> int:
        return plan.num_rows * (int(predicts) + 3 * int(matches))

    def length(plan: MicrobatchPlan) -> int:
        return config.vision.tokens_per_image + plan.row_length

    if predicts or matches:
        nodes.append(_pairs(config, settings, predicts, matches, pairs, length))
        memory = {"memory_width": config.text.hidden_size, "pairs": pairs, "memory_length": length}
        nodes += perceiver_nodes(config.perceiver, settings, std, **memory)
    if matches:
        nodes.append(_match_head(config, settings, predicts))
        losses.append(matching_loss(weight=config.matching_weight))
    if predicts:
        nodes.append(query_node(config.perceiver, settings, std, num_queries=config.max_positions, rows=rows_of))
        nodes.append(_masked_head(config, settings))
        kind = settings.performance.cross_entropy
        losses.append(masked_lm_loss(weight=config.masked_lm_weight, sharded=False, kind=kind))
    return Graph(nodes, losses)


def mean_token(text: torch.Tensor, context: ForwardContext) -> torch.Tensor:
    """Mean of each row's clean tokens, padding left out: [2R, T, C] -> [R, C]."""
    documents = context.batch.document_ids_RT
    return masked_mean(text[: documents.shape[0]], documents >= 0)


class Pairs(nn.Module):
    """What the latents read; no weights."""

    def __init__(self, predicts: bool, matches: bool) -> None:
        super().__init__()
        self.predicts, self.matches = predicts, matches

    def forward(self, image_memory: torch.Tensor, text: torch.Tensor, *rest) -> tuple[torch.Tensor, ...]:
        """[I, M, C], [2R, T, C] (and embeddings [R, E], [R, E], scale [1]) -> memory, mask (and [3R] what counts)."""
        *matching, context = rest
        batch = context.batch
        rows = batch.plan.num_rows
        images_RMC = image_memory.index_select(0, image_of_row(batch))
        memories, masks, valid = [], [], ()
        if self.predicts:
            memories.append(torch.cat((images_RMC, text[rows:]), dim=1))
            seen_RM = rows_with_image(batch)[:, None].expand(-1, images_RMC.shape[1])
            masks.append(torch.cat((seen_RM, (batch.document_ids_RT >= 0).float()), dim=1))
        if self.matches:
            memory, mask, counts = matching_pairs(context, images_RMC, text[:rows], *matching)
            memories.append(memory)
            masks.append(mask)
            valid = (counts,)
        memory = memories[0] if len(memories) == 1 else torch.cat(memories)
        return (memory, masks[0] if len(masks) == 1 else torch.cat(masks), *valid)


def _pairs(
    config: PerceiverFusionConfig,
    settings: LayerSettings,
    predicts: bool,
    matches: bool,
    pairs: Callable[[MicrobatchPlan], int],
    length: Callable[[MicrobatchPlan], int],
) -> Node:
    """`fusion.pairs`: as many memories as `pairs` says, each of `length` positions."""
    width = config.text.hidden_size
    streams = [
        Stream("pair_memory", lambda plan: (pairs(plan), length(plan), width)),
        Stream("pair_mask", lambda plan: (pairs(plan), length(plan)), dtype=torch.float32),
    ]
    reads: tuple[str, ...] = ("image_memory", "text")
    fields = frozenset()
    if matches:
        streams.append(Stream("match_valid", lambda plan: (3 * plan.num_rows,), dtype=torch.float32))
        reads += ("image_embedding", "text_embedding", "logit_scale")
        fields = frozenset({"tokens_RT"})

    def cost(plan: MicrobatchPlan) -> NodeCost:
        """The memory, which the latents' norms keep, and the similarities of own rows to those of the pool, twice."""
        sizes, everywhere = settings.sizes, copies(settings.sizes, sharded=False)
        make, memory = StackWork(settings), pairs(plan) * length(plan) * width
        work: list[Work] = [make.moved(2 * memory, "pairs")]
        if matches:
            work += _matching_work(make, plan, config)
        return NodeCost(0, tuple(work), 2.0 * memory * everywhere, sizes.tp_cp)

    build = partial(Pairs, predicts, matches)
    return Node("fusion.pairs", Kind(build, cost), reads, tuple(streams), fields=fields)


def _matching_work(make: StackWork, plan: MicrobatchPlan, config: PerceiverFusionConfig) -> Iterator[Work]:
    """The search for hard negatives, which no gradient passes, and what is gathered of the pool for them."""
    rows, dp, size = plan.num_rows, make.settings.sizes.dp, config.contrastive.embedding_size
    pool, length = rows * dp, plan.row_length
    yield MatrixProduct(rows, pool, size, count=2, what="similarities")
    if dp == 1:
        return
    states = pool * config.text.hidden_size
    for what, values in (("images", config.vision.tokens_per_image * states), ("texts", length * states)):
        yield Collective("all_gather", "dp", make.bytes(values), what=what)
        yield Collective("reduce_scatter", "dp", make.bytes(values), runs="dgrad", what=what)
    # Of two embeddings, fp32; of numbers and tokens, int64; of who has an image, and of the positions seen, fp32.
    yield Collective("all_gather", "dp", 4 * pool * size, count=2, what="embeddings")
    of_row = {"tokens": 8 * length, "sample numbers": 8, "rows with an image": 4, "positions": 4 * length}
    for what, row in of_row.items():
        yield Collective("all_gather", "dp", pool * row, what=what)


def _latent_shape(config: PerceiverFusionConfig) -> StackShape:
    """What norms and heads behind the latents are told."""
    part = config.perceiver
    return StackShape.of(
        part,
        num_layers=1,
        normalization="LayerNorm",
        norm_epsilon=part.layernorm_epsilon,
        init_std=config.init_std,
    )


def _match_head(config: PerceiverFusionConfig, settings: LayerSettings, predicts: bool) -> Node:
    """Mean latent of each matching pair -> logits of match and no match."""
    shape = _latent_shape(config)

    def pool(latents: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        return latents[context.batch.plan.num_rows if predicts else 0 :].mean(dim=1)

    def pairs(plan: MicrobatchPlan) -> int:
        return 3 * plan.num_rows

    logits = Stream("match_logits", lambda plan: (3 * plan.num_rows, 2), dtype=torch.float32)
    names = PooledHeadNames("match_projection.weight", "match_norm")
    kind = PooledHeadKind(settings, shape.hidden_size, 2, pool, pairs, names, shape)
    return Node("matching.head", kind, ("latents",), (logits,))


def _masked_head(config: PerceiverFusionConfig, settings: LayerSettings) -> Node:
    shape, vocab, width = _latent_shape(config), config.text.vocab_size, config.text.hidden_size
    logits = Stream("logits", lambda plan: (plan.num_rows * plan.row_length, 1, vocab))
    names = HeadNames("lm_norm", projection="lm_projection.weight")
    kind = LanguageHeadKind(settings, shape, vocab, names, sharded=False, output_width=width)
    ties = {"output_layer.weight": EMBEDDING}
    return Node("masked_lm.output", kind, ("query_states",), (logits,), ties=ties)
