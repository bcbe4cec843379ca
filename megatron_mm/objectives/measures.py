"""What a model makes of an objective on rows of data, beside its loss: recall, accuracy, and what needs no model.

    Retrieval      recall@K in both directions, over all rows that have both sides
    TokenAccuracy  share of the tokens that are found
    Matching       balanced accuracy over own pairs and the hard negatives of each microbatch
    MaskedPatches  mean squared error of the hidden patches, beside that of predicting every patch's mean
    MeanLoss       the loss alone

A loss names its measure (`models.graph.Loss.measure`), as one of a user's own does.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict

import torch

from megatron_mm.data.reading.microbatch import Microbatch
from megatron_mm.models.graph import ForwardContext, Loss
from megatron_mm.objectives.retrieval import score_both_directions

Streams = dict[str, torch.Tensor]


class MeanLoss:
    """The loss itself, over the global count of all rows."""

    def __init__(self, loss: Loss) -> None:
        self.loss, self.total, self.count = loss, 0.0, 0.0

    def add(self, streams: Streams, context: ForwardContext) -> None:
        """Takes a microbatch."""
        # megatron-core's cross-entropy works in place.
        values = [streams[name].clone() for name in self.loss.reads]
        self.total += float(self.loss.compute(*values, context))
        self.count += float(self.loss.count(context.batch))

    def figures(self) -> dict[str, float]:
        """{"loss"}; empty if nothing counted."""
        return {"loss": self.total / self.count} if self.count else {}


class TokenAccuracy(MeanLoss):
    """A loss over tokens: also the share of them that are the likeliest, and that of the commonest token."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(loss)
        self.right, self.truth = 0, Counter()

    def add(self, streams: Streams, context: ForwardContext) -> None:
        """Takes a microbatch."""
        batch = context.batch
        masked = "masked_labels_RT" in self.loss.fields
        labels_RT = batch.masked_labels_RT if masked else batch.labels_RT
        counted_RT = (batch.masked_loss_mask_RT if masked else batch.loss_mask_RT) > 0
        found_RT = streams[self.loss.reads[0]].argmax(dim=-1).reshape(labels_RT.shape)
        self.right += int((found_RT == labels_RT)[counted_RT].sum())
        self.truth.update(labels_RT[counted_RT].tolist())
        super().add(streams, context)

    def figures(self) -> dict[str, float]:
        """{"loss", "accuracy", "majority", "tokens"}."""
        tokens = self.truth.total()
        if not tokens:
            return {}
        majority = max(self.truth.values()) / tokens
        return super().figures() | {"accuracy": self.right / tokens, "majority": majority, "tokens": tokens}


class Retrieval:
    """A contrastive loss: recall of its two embeddings over all rows. Rows of one text are right for each other."""

    def __init__(self, loss: Loss) -> None:
        self.first, self.second = loss.reads[:2]
        self.embeddings: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        self.labels: list[tuple[int, ...]] = []

    def add(self, streams: Streams, context: ForwardContext) -> None:
        """Takes a microbatch."""
        batch = context.batch
        both_R = _has(batch, self.first) & _has(batch, self.second)
        for kept, name in zip(self.embeddings, (self.first, self.second)):
            kept.append(streams[name][both_R].cpu())
        tokens, documents = batch.tokens_RT[both_R].tolist(), batch.document_ids_RT[both_R].tolist()
        self.labels += [tuple(t for t, d in zip(*row) if d >= 0) for row in zip(tokens, documents)]

    def figures(self) -> dict[str, float]:
        """Figures of both directions, such as "image_to_text/recall_at_1"; empty without two different pairs."""
        if len(set(self.labels)) < 2:
            return {}
        scores = score_both_directions(*map(torch.cat, self.embeddings), self.labels)
        first, second = (name.removesuffix("_embedding") for name in (self.first, self.second))
        names = (f"{first}_to_{second}", f"{second}_to_{first}")
        return {f"{name}/{key}": value for name, score in zip(names, scores) for key, value in asdict(score).items()}


class Matching(MeanLoss):
    """Pairs that belong together and pairs that do not, told apart.

    A pair is taken to match where that is likelier than among the pairs of training, of which one in three does: the
    balanced accuracy gives both kinds equal weight, and a threshold of one half would not.
    """

    def __init__(self, loss: Loss) -> None:
        super().__init__(loss)
        self.right, self.pairs = [0, 0], [0, 0]

    def add(self, streams: Streams, context: ForwardContext) -> None:
        """Takes a microbatch: [3R, 2] logits (match, no match) of own pairs, wrong texts, wrong images."""
        logits, valid = (streams[name] for name in self.loss.reads)
        matches, counted = logits[:, 0] - logits[:, 1] > -math.log(2), valid > 0
        own = torch.arange(len(matches)) < len(matches) // 3
        for kind, (pairs, right) in enumerate(((own, matches), (~own, ~matches))):
            self.right[kind] += int(right[pairs & counted].sum())
            self.pairs[kind] += int((pairs & counted).sum())
        super().add(streams, context)

    def figures(self) -> dict[str, float]:
        """{"loss", "accuracy"}: the mean of the shares of true and of false pairs told as such, 0.5 by chance."""
        if not all(self.pairs):
            return {}
        return super().figures() | {"accuracy": sum(r / p for r, p in zip(self.right, self.pairs)) / 2}


class MaskedPatches(MeanLoss):
    """Masked autoencoding, beside the same loss of a prediction of zero: each patch's mean, where those are normed."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(loss)
        self.of_zero = 0.0

    def add(self, streams: Streams, context: ForwardContext) -> None:
        """Takes a microbatch."""
        self.of_zero += float(self.loss.compute(torch.zeros_like(streams[self.loss.reads[0]]), context))
        super().add(streams, context)

    def figures(self) -> dict[str, float]:
        """{"loss", "loss_of_mean"}."""
        return super().figures() | {"loss_of_mean": self.of_zero / self.count} if self.count else {}


def _has(batch: Microbatch, embedding: str) -> torch.Tensor:
    """[R] bool: rows that have what an embedding stream is named after."""
    kind = embedding.removesuffix("_embedding")
    if kind == "audio":
        return batch.sound_slots_RJ[:, 0] >= 0
    if kind in ("image", "vision", "video"):
        image = batch.image_slots_RK[:, 0] >= 0
        return image if batch.clip_slots_R is None else image | (batch.clip_slots_R >= 0)
    return batch.document_ids_RT[:, 0] >= 0
