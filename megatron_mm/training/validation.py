"""Losses and measures of a run on held-out samples.

The last stage's processes measure what they have of each microbatch; the counts of all of them are merged, and figures
are made of the whole. They are the same in every layout, but for those of an objective whose rows meet in a microbatch
(contrastive loss without `negatives: batch`, hard negatives of matching): these depend on how large that is.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mm.models.graph import Loss
from megatron_mm.objectives.measures import Measure
from megatron_mm.pipeline.schedule import BatchResult, Pipeline, run_batch


class Validation:
    """One pass over held-out samples.

    Args:
        pipeline: in evaluation mode.

    Raises:
        ValueError: the measure of a loss cannot be merged over processes.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.losses: dict[str, Loss] = {loss.name: loss for loss in pipeline.graph.losses}
        self.measures = {name: _measure(loss) for name, loss in self.losses.items() if loss.measure is not None}
        self._last = pipeline.bare_chunks[-1].post_process
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}
        self._found: list[tuple[str, list[tuple[str, float]]]] = []
        self._failed: list[tuple[str, str]] = []

    @property
    def fields(self) -> frozenset[str]:
        """Microbatch fields that this process reads."""
        measured = [measure.fields for measure in self.measures.values()] if self._last else []
        return self.pipeline.fields().union(*measured)

    @torch.no_grad()
    def add(self, microbatches: list) -> BatchResult:
        """Takes this process's microbatches of a global batch; collective over all processes."""
        result = run_batch(self.pipeline, microbatches, forward_only=True, measures=self.measures)
        for name, mean in result.losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + mean * result.counts[name]
            self._counts[name] = self._counts.get(name, 0.0) + result.counts[name]
        return result

    def figures(self) -> dict[str, float]:
        """`validation_loss`; each loss, where there are several; each figure of a measure as `validation_LOSS_FIGURE`.

        Collective over all processes, which all get them.
        """
        self._measured()
        means = {name: self._sums[name] / max(1.0, self._counts[name]) for name in self._sums}
        return {
            "validation_loss": sum(loss.weight * means.get(name, 0.0) for name, loss in self.losses.items()),
            **({f"validation_{name}": mean for name, mean in means.items()} if len(self.losses) > 1 else {}),
            **{f"validation_{name}_{key}": value for name, found in self._found for key, value in found},
        }

    def console_line(self) -> str:
        """What the measures found, for the console; empty where there is none. After `figures`."""
        parts = [f"{name} {', '.join(f'{key} {value:.4g}' for key, value in found)}" for name, found in self._found]
        parts += [f"{name} not measured: {why}" for name, why in self._failed]
        return f"validation of {'; '.join(parts)}" if parts else ""

    def _measured(self) -> None:
        """Merges what all processes have counted; one process a group makes figures of it, and all get them.

        A measure that has none, such as recall of embeddings that are not finite, does not end a run: the step's
        checkpoint is not written yet.
        """
        if not self.measures:
            return
        message: list = [None]
        if self._last:
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            first = dist.get_process_group_ranks(group)[0]
            own = {name: measure.counts() for name, measure in self.measures.items()}
            everyone: list | None = [None] * group.size() if dist.get_rank() == first else None
            dist.gather_object((parallel_state.get_context_parallel_rank(), own), everyone, first, group)
            if everyone is not None:
                message = [self._merged(everyone)]
            dist.broadcast_object_list(message, first, group)
        if self.pipeline.sizes.pp > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast_object_list(message, last, parallel_state.get_pipeline_model_parallel_group())
        self._found, self._failed = message[0]

    def _merged(self, everyone: list) -> tuple[list, list]:
        """Of (context-parallel rank, counts) of each process: (loss, its figures) and (loss, why it has none)."""
        found, failed = [], []
        for name in self.measures:
            loss, whole = self.losses[name], _measure(self.losses[name])
            for context_rank, counts in everyone:
                if loss.sharded or context_rank == 0:  # the others have counted the same
                    whole.merge(counts[name])
            try:
                if figures := list(whole.figures().items()):
                    found.append((name, figures))
            except ValueError as error:
                failed.append((name, str(error)))
        return found, failed


def _measure(loss: Loss) -> Measure:
    measure = loss.measure(loss)
    if not isinstance(measure, Measure):
        raise ValueError(
            f"loss {loss.name!r}: its measure is a {type(measure).__name__}, which cannot be merged over processes; "
            "derive it from Measure of megatron_mm/objectives/measures.py"
        )
    return measure
