"""What a model makes of an objective on held-out rows: recall, accuracy, and what needs no model to compare with.

    Retrieval      recall@K in both directions, over all rows that have both sides
    TokenAccuracy  share of the tokens that are found
    Matching       balanced accuracy over own pairs and the hard negatives of each microbatch
    MaskedPatches  the loss of predicting every patch's mean, to compare the mean of the loss with
    MeanLoss       the loss alone

A loss names its measure (`models.graph.Loss.measure`), as one of a user's own does. Each process adds what it has of
the microbatches; what they counted is merged (`counts`, `merge`) before any figure is made of it, so that the figures
are the same in every layout (but for Matching's, whose negatives are of one microbatch). Scores
(evaluation/objectives.py) and validation (training/validation.py) read the same. Scoring imports this before the
platform is set up, so what needs megatron-core is imported where it is used.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from typing import Any, ClassVar

import torch

from megatron_mm.data.reading.microbatch import Microbatch
from megatron_mm.models.graph import ForwardContext, Loss
from megatron_mm.objectives.retrieval import score_both_directions

Streams = dict[str, torch.Tensor]


class Measure:
    """What is counted of a loss over microbatches, and the figures that this makes.

    A measure of a user's own derives from it. Streams are as the last stage of a layout has them: one of layout
    `sequence` is this context-parallel process's part; logits may be its tensor-parallel process's part of the
    vocabulary. Where the loss is not sharded (`Loss.sharded`), every context-parallel process counts the same, and the
    first one's counts are taken.
    """

    fields: ClassVar[frozenset[str]] = frozenset()
    """Fields of a microbatch that it reads, beyond the loss's."""
    loss_beside: ClassVar[bool] = True
    """Whether the mean of the loss is reported beside it: not where that depends on which rows are a microbatch."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def add(self, streams: Streams, context: ForwardContext) -> None:
        """Takes a microbatch."""
        raise NotImplementedError

    def counts(self) -> Any:
        """What was counted so far, as plain values and tensors on the CPU."""
        raise NotImplementedError

    def merge(self, counts: Any) -> None:
        """Adds what the measure of other rows has counted."""
        raise NotImplementedError

    def figures(self) -> dict[str, float]:
        """By name; empty if nothing counted."""
        raise NotImplementedError


class Sums(Measure):
    """A measure whose counts are numbers that add up."""

    names: ClassVar[tuple[str, ...]]
    """Attributes that hold them."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(loss)
        for name in self.names:
            setattr(self, name, 0.0)

    def counts(self) -> tuple[float, ...]:
        """The numbers."""
        return tuple(getattr(self, name) for name in self.names)

    def merge(self, counts: tuple[float, ...]) -> None:
        """Adds them."""
        for name, count in zip(self.names, counts, strict=True):
            setattr(self, name, getattr(self, name) + count)


class MeanLoss(Sums):
    """The loss itself, over the global count of all rows."""

    names = ("total", "count")

    def add(self, streams: Streams, context: ForwardContext) -> None:
        """Takes a microbatch."""
        # megatron-core's cross-entropy works in place.
        values = [streams[name].clone() for name in self.loss.reads]
        self.total += float(self.loss.compute(*values, context))
        self.count += _share_of_count(self.loss, context)

    def figures(self) -> dict[str, float]:
        """{"loss"}; empty if nothing counted."""
        return {"loss": self.total / self.count} if self.count else {}


def _share_of_count(loss: Loss, context: ForwardContext) -> float:
    """The loss's count of a microbatch, or this context-parallel process's share where the loss is in parts."""
    from megatron.core import parallel_state

    return loss.counted(context.batch) / (parallel_state.get_context_parallel_world_size() if loss.sharded else 1)


class TokenAccuracy(Measure):
    """A loss over tokens: the share of them that are the likeliest, and that of the commonest token.

    Args:
        vocabulary_parallel: logits are this tensor-parallel process's part of the vocabulary, as cross-entropy of the
            package takes them (objectives/cross_entropy.py).
    """

    def __init__(self, loss: Loss, vocabulary_parallel: bool = False) -> None:
        super().__init__(loss)
        self.vocabulary_parallel = vocabulary_parallel
        self.right, self.truth = 0, Counter()

    def add(self, streams: Streams, context: ForwardContext) -> None:
        """Takes a microbatch."""
        from megatron_mm.models.layers.sharding import local_text
        from megatron_mm.objectives.cross_entropy import likeliest

        batch = context.batch
        masked = "masked_labels_RT" in self.loss.fields
        labels_RT = batch.masked_labels_RT if masked else batch.labels_RT
        counted_RT = (batch.masked_loss_mask_RT if masked else batch.loss_mask_RT) > 0
        if self.loss.sharded:
            labels_RT, counted_RT = local_text(labels_RT), local_text(counted_RT)
        logits = streams[self.loss.reads[0]]
        found = likeliest(logits) if self.vocabulary_parallel else logits.argmax(dim=-1)
        self.right += int((found.reshape(labels_RT.shape) == labels_RT)[counted_RT].sum())
        self.truth.update(labels_RT[counted_RT].tolist())

    def counts(self) -> tuple[int, Counter]:
        """Tokens found, and how often each was the truth."""
        return self.right, self.truth

    def merge(self, counts: tuple[int, Counter]) -> None:
        """Adds them."""
        self.right += counts[0]
        self.truth.update(counts[1])

    def figures(self) -> dict[str, float]:
        """{"accuracy", "majority", "tokens"}."""
        tokens = self.truth.total()
        if not tokens:
            return {}
        majority = max(self.truth.values()) / tokens
        return {"accuracy": self.right / tokens, "majority": majority, "tokens": tokens}


class Retrieval(Measure):
    """A contrastive loss: recall of its two embeddings over all rows. Rows of one text are right for each other."""

    fields = frozenset({"tokens_RT"})
    loss_beside = False

    def __init__(self, loss: Loss) -> None:
        super().__init__(loss)
        self.first, self.second = loss.reads[:2]
        self.embeddings: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        self.labels: list[tuple[int, ...]] = []

    def add(self, streams: Streams, context: ForwardContext) -> None:
        """Takes a microbatch."""
        batch = context.batch
        both_R = _has(batch, self.first) & _has(batch, self.second)
        for kept, name in zip(self.embeddings, (self.first, self.second)):
            kept.append(streams[name].detach()[both_R].cpu())
        tokens, documents = batch.tokens_RT[both_R].tolist(), batch.document_ids_RT[both_R].tolist()
        self.labels += [tuple(t for t, d in zip(*row) if d >= 0) for row in zip(tokens, documents)]

    def counts(self) -> tuple:
        """Embeddings and texts."""
        return self.embeddings, self.labels

    def merge(self, counts: tuple) -> None:
        """Adds them."""
        for kept, others in zip(self.embeddings, counts[0]):
            kept += others
        self.labels += counts[1]

    def figures(self) -> dict[str, float]:
        """Figures of both directions, such as "image_to_text/recall_at_1"; empty without two different pairs."""
        if len(set(self.labels)) < 2:
            return {}
        scores = score_both_directions(*map(torch.cat, self.embeddings), self.labels)
        first, second = (name.removesuffix("_embedding") for name in (self.first, self.second))
        names = (f"{first}_to_{second}", f"{second}_to_{first}")
        return {f"{name}/{key}": value for name, score in zip(names, scores) for key, value in asdict(score).items()}


class Matching(Sums):
    """Pairs that belong together and pairs that do not, told apart.

    A pair is taken to match where that is likelier than among the pairs of training, of which one in three does: the
    balanced accuracy gives both kinds equal weight, and a threshold of one half would not.
    """

    names = ("own_right", "own_pairs", "wrong_right", "wrong_pairs")

    def add(self, streams: Streams, context: ForwardContext) -> None:
        """Takes a microbatch: [3R, 2] logits (match, no match) of own pairs, wrong texts, wrong images."""
        logits, valid = (streams[name] for name in self.loss.reads)
        matches, counted = logits[:, 0] - logits[:, 1] > -math.log(2), valid > 0
        own = torch.arange(len(matches), device=matches.device) < len(matches) // 3
        told = [int((kind & counted).sum()) for kind in (own & matches, own, ~own & ~matches, ~own)]
        self.merge(tuple(told))

    def figures(self) -> dict[str, float]:
        """{"accuracy"}: the mean of the shares of true and of false pairs told as such, 0.5 by chance."""
        if not (self.own_pairs and self.wrong_pairs):
            return {}
        return {"accuracy": (self.own_right / self.own_pairs + self.wrong_right / self.wrong_pairs) / 2}


class MaskedPatches(Sums):
    """Masked autoencoding: the same loss of a prediction of zero, each patch's mean where those are normed."""

    names = ("of_zero", "count")

    def add(self, streams: Streams, context: ForwardContext) -> None:
        """Takes a microbatch."""
        self.of_zero += float(self.loss.compute(torch.zeros_like(streams[self.loss.reads[0]]), context))
        self.count += _share_of_count(self.loss, context)

    def figures(self) -> dict[str, float]:
        """{"loss_of_mean"}."""
        return {"loss_of_mean": self.of_zero / self.count} if self.count else {}


def _has(batch: Microbatch, embedding: str) -> torch.Tensor:
    """[R] bool: rows that have what an embedding stream is named after."""
    kind = embedding.removesuffix("_embedding")
    if kind == "audio":
        return batch.sound_slots_RJ[:, 0] >= 0
    if kind in ("image", "vision", "video"):
        image = batch.image_slots_RK[:, 0] >= 0
        return image if batch.clip_slots_R is None else image | (batch.clip_slots_R >= 0)
    return batch.document_ids_RT[:, 0] >= 0
