"""Losses and measures of a run on held-out samples, the same figures in every layout.

The last stage's processes measure what they have of each microbatch; the counts of all of them are merged, and figures
are made of the whole.
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
        means = {name: self._sums[name] / max(1.0, self._counts[name]) for name in self._sums}
        return {
            "validation_loss": sum(loss.weight * means.get(name, 0.0) for name, loss in self.losses.items()),
            **({f"validation_{name}": mean for name, mean in means.items()} if len(self.losses) > 1 else {}),
            **{f"validation_{name}_{key}": value for name, key, value in self._measured()},
        }

    def _measured(self) -> list[tuple[str, str, float]]:
        """(loss, figure, value) of every measure."""
        found: list = []
        if self._last and self.measures:
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            own = {name: measure.counts() for name, measure in self.measures.items()}
            everyone: list = [None] * group.size()
            dist.all_gather_object(everyone, (parallel_state.get_context_parallel_rank(), own), group=group)
            for name in self.measures:
                loss, whole = self.losses[name], _measure(self.losses[name])
                for context_rank, counts in everyone:
                    if loss.sharded or context_rank == 0:  # the others have counted the same
                        whole.merge(counts[name])
                found += [(name, key, value) for key, value in whole.figures().items()]
        if self.pipeline.sizes.pp > 1 and self.measures:
            message = [found]
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast_object_list(message, last, parallel_state.get_pipeline_model_parallel_group())
            (found,) = message
        return found


def console_line(figures: dict[str, float], losses: list[Loss]) -> str:
    """What the measures found, for the console; empty where there is none."""
    parts = []
    for loss in losses:
        start = f"validation_{loss.name}_"
        found = [f"{key.removeprefix(start)} {value:.4g}" for key, value in figures.items() if key.startswith(start)]
        parts += [f"{loss.name} {', '.join(found)}"] if loss.measure is not None and found else []
    return f"validation of {'; '.join(parts)}" if parts else ""


def _measure(loss: Loss) -> Measure:
    measure = loss.measure(loss)
    if not isinstance(measure, Measure):
        raise ValueError(
            f"loss {loss.name!r}: its measure is a {type(measure).__name__}, which cannot be merged over processes; "
            "derive it from Measure of megatron_mm/objectives/measures.py"
        )
    return measure
