"""What a model makes of each of its objectives on held-out rows, beside what needs no model.

One pass over the rows for each task of the system; each loss of its graph names its measure (objectives/measures.py).
Each figure is named `objective/figure`, so that two models, or a model and a baseline, compare by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from megatron_mm.config.schema import Config
from megatron_mm.data.reading.microbatch import Microbatch
from megatron_mm.evaluation.streams import GraphReader, all_rows
from megatron_mm.models.graph import ForwardContext, Loss
from megatron_mm.objectives.measures import MeanLoss, Measure, Streams

Rows = Callable[..., Iterator[Microbatch]]


def score_objectives(
    reader: GraphReader, config: Config, batch_size: int = 64, limit: int = 0, rows: Rows = all_rows
) -> dict[str, float]:
    """Figures of every objective of the reader's graph over the rows of `config.data`, by `objective/figure`.

    Args:
        reader: the model.
        config: the recipe whose datasets are read (`streams.reading_jsonl`).
        batch_size: rows of a microbatch; hard negatives are chosen within it.
        limit: at most this many rows; 0 takes all.
        rows: which of the recipe's rows (streams.py).

    Raises:
        ValueError: nothing in the rows counts for any objective.
    """
    figures: dict[str, float] = {}
    for task in [name for name, _ in config.model.inputs.tasks] or [""]:
        losses = [loss for loss in reader.graph.losses if loss.tasks is None or task in loss.tasks]
        measures = [measure for loss in losses for measure in _measures(loss)]
        names = frozenset().union(*(loss.reads for loss in losses))
        fields = reader.fields(names).union(*(measure.loss.fields | measure.fields for measure in measures))
        for batch in rows(config, fields, batch_size, task, limit):
            _measure(measures, *reader.run(batch, names))
        for measure in measures:
            figures |= {f"{measure.loss.name}/{key}": value for key, value in measure.figures().items()}
    if not figures:
        raise ValueError("nothing in the held-out rows counts for any objective of this model")
    return figures


def _measures(loss: Loss) -> list[Measure]:
    """The mean of the loss, and what measures it."""
    own = [loss.measure(loss)] if loss.measure is not None else []
    return own if own and not own[0].loss_beside else [MeanLoss(loss), *own]


@torch.inference_mode()
def _measure(measures: Iterable[Measure], streams: Streams, context: ForwardContext) -> None:
    for measure in measures:
        measure.add(streams, context)
