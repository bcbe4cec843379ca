"""Graphs of little but an objective: streams are learned tables of samples, so that their gradients are seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.models.graph import ForwardContext, Graph, Kind, Node, NodeCost, Stream
from megatron_mm.models.layers.parameters import describe, empty_parameter
from megatron_mm.models.layers.settings import LayerSettings
from megatron_mm.objectives.contrastive import image_text_loss
from megatron_mm.objectives.matching import matching_loss
from megatron_mm.parts.contrastive.nodes import scale_node
from megatron_mm.parts.contrastive.section import ContrastiveConfig
from megatron_mm.systems.perceiver_fusion.graph import Pairs

SAMPLES, EMBEDDING, IMAGE, TEXT, WIDTH = 16, 6, 3, 4, 5
#: Of the first eight samples two that are one process's of four have no image; of the others one alone has.
WITH_IMAGE = {0, 1, 4, 5, 6, 7, 9}
Case = tuple[Graph, Callable[[Sequence[int]], Microbatch]]


class Table(nn.Module):
    """A learned value of each sample."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.table = empty_parameter(SAMPLES, *shape, dtype=torch.float32)

    def forward(self, context: ForwardContext) -> torch.Tensor:
        """[rows, …]."""
        return self.table[context.batch.sample_numbers_R]


def table_node(name: str, *shape: int) -> Node:
    """Writes the stream `name` [R, …], fp32."""

    def build() -> nn.Module:
        return describe(Table(*shape), init_std=1.0)

    return Node(
        name,
        Kind(build, _free),
        (),
        (Stream(name, lambda plan: (plan.num_rows, *shape), dtype=torch.float32),),
    )


def _free(plan: MicrobatchPlan) -> NodeCost:
    return NodeCost(0)


def rows(numbers: Sequence[int], with_image: set[int], tokens: torch.Tensor | None = None) -> Microbatch:
    """Rows of global sample numbers; image r is row r's, whether it has one or not. Texts are of different lengths."""
    count, sample_numbers = len(numbers), torch.tensor(numbers)
    if tokens is None:
        tokens = torch.stack([torch.tensor([number % 5, 1, 2, number % 3]) for number in numbers])
    length = tokens.shape[1]
    slots = torch.tensor([[row if number in with_image else -1] for row, number in enumerate(numbers)])
    lengths = torch.tensor([2 + number % (length - 1) for number in numbers])
    documents = torch.where(torch.arange(length) < lengths[:, None], 0, -1)
    return Microbatch(
        plan=MicrobatchPlan(count, length, count, 1, 1, 1, True, length),
        document_ids_RT=documents,
        position_ids_RT=torch.arange(length).repeat(count, 1),
        loss_mask_RT=torch.ones(count, length),
        image_slots_RK=slots,
        image_slot_documents_RK=torch.where(slots >= 0, 0, -2),
        sound_slots_RJ=torch.full((count, 1), -1),
        sound_slot_documents_RJ=torch.full((count, 1), -2),
        sample_numbers_R=sample_numbers,
        tokens_RT=tokens,
    )


def contrastive(settings: LayerSettings, negatives: str = "microbatch") -> Case:
    """Two embeddings and the scale, and nothing else."""
    part = ContrastiveConfig(embedding_size=EMBEDDING, temperature=0.2, negatives=negatives)
    nodes = [table_node("image_embedding", EMBEDDING), table_node("text_embedding", EMBEDDING)]
    return Graph([*nodes, scale_node(settings, part)], [image_text_loss(part, 0.5)]), lambda n: rows(n, WITH_IMAGE)


def contrastive_over_batch(settings: LayerSettings) -> Case:
    """The same with the negatives of the whole batch."""
    return contrastive(settings, "batch")


class MatchHead(nn.Module):
    """Logits from the products of what a pair's image and its visible text sum to."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = empty_parameter(2, WIDTH, dtype=torch.float32)

    def forward(self, memory: torch.Tensor, mask: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """[3R, IMAGE + TEXT, WIDTH], [3R, IMAGE + TEXT] -> [3R, 2]."""
        image, text = (memory * mask[..., None]).split((IMAGE, TEXT), dim=1)
        return torch.tanh(image.sum(1) * text.sum(1)) @ self.weight.t()


def matching(settings: LayerSettings) -> Case:
    """Pairs with hard negatives and a small head; some samples have equal texts, some no image."""
    part = ContrastiveConfig(embedding_size=EMBEDDING, temperature=1.0)
    nodes = [
        table_node("image_memory", IMAGE, WIDTH),
        table_node("text", TEXT, WIDTH),
        table_node("image_embedding", EMBEDDING),
        table_node("text_embedding", EMBEDDING),
        scale_node(settings, part),
    ]
    pairs = [
        Stream("pair_memory", lambda plan: (3 * plan.num_rows, IMAGE + TEXT, WIDTH), dtype=torch.float32),
        Stream("pair_mask", lambda plan: (3 * plan.num_rows, IMAGE + TEXT), dtype=torch.float32),
        Stream("match_valid", lambda plan: (3 * plan.num_rows,), dtype=torch.float32),
    ]
    reads = ("image_memory", "text", "image_embedding", "text_embedding", "logit_scale")
    nodes.append(Node(
        "pairs",
        Kind(lambda: Pairs(False, True), _free),
        reads,
        tuple(pairs),
        fields=frozenset({"tokens_RT"}),
    ))
    logits = Stream("match_logits", lambda plan: (3 * plan.num_rows, 2), dtype=torch.float32)

    def head() -> nn.Module:
        return describe(MatchHead(), init_std=1.0)

    nodes.append(Node("head", Kind(head, _free), ("pair_memory", "pair_mask"), (logits,)))
    return Graph(nodes, [matching_loss(weight=0.7)]), lambda n: rows(n, WITH_IMAGE | {2, 10, 11, 12})
