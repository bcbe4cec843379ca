"""What keeps a run from losing work: the watchdog of hung collectives, and values that are not finite."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mm.data.reading.microbatch import Microbatch
from megatron_mm.pipeline.schedule import BatchResult, Pipeline, run_batch
from megatron_mm.pipeline.stage import PipelineChunk
from megatron_mm.platform import setup, stopping
from megatron_mm.platform.atomic_files import written_whole

#: How long a process that gives up waits for the others to have left their stacks: the launcher ends them with it.
_STACKS_WITHIN_SECONDS = 60.0


class Watchdog:
    """Ends a process that makes no progress, leaving the stacks of all its threads.

    Every process has its own, so a hung collective leaves the stacks of every rank: the waiting ones and the one that
    they wait for.

    Args:
        folder: stacks are written to `stacks/rank_N.txt` under it, and to standard error.
        minutes: without a `beat` for so long, the process is ended with status 1.
    """

    def __init__(self, folder: Path, minutes: float) -> None:
        self.folder, self.seconds = folder / "stacks", minutes * 60
        self._last, self._began = time.monotonic(), time.time()
        self._where = "start-up"
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def beat(self, where: str) -> None:
        """Says that progress was made, and what comes next."""
        self._last, self._where = time.monotonic(), where

    def stop(self) -> None:
        """Ends the watch."""
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self._last > self.seconds:
                self._give_up()

    def _give_up(self) -> None:
        rank = setup.rank()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._stacks_of(rank)
        with written_whole(path, partial=path.with_suffix(".partial")) as file:
            file.write(path.read_text() if path.exists() else "")  # after those of an earlier run
            print(f"rank {rank} made no progress for {self.seconds:.0f} s in {self._where}", file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
            print(
                f"error: rank {rank} made no progress for {self.seconds:.0f} s in {self._where}; stacks are in {path}",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            # The file gets its name last: where it is, its rank has said everything.
        until = time.monotonic() + _STACKS_WITHIN_SECONDS
        while time.monotonic() < until and not all(map(self._has_given_up, range(setup.world_size()))):
            time.sleep(0.1)
        stopping.exit_at_once(1)

    def _stacks_of(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}.txt"

    def _has_given_up(self, rank: int) -> bool:
        """Whether a process has left its stacks, in this run: an earlier one may have left some too."""
        try:
            return self._stacks_of(rank).stat().st_mtime >= self._began
        except OSError:
            return False


class NotFiniteError(ValueError):
    """A loss or a gradient is NaN or infinite; nothing was updated."""


def explain_loss(pipeline: Pipeline, result: BatchResult, microbatches: list[Microbatch], iteration: int) -> str:
    """Where a loss that is not finite was first seen: rank, stage, nodes, microbatch and its samples.

    Collective: every process calls it.
    """
    seen = []
    for chunk in pipeline.bare_chunks:
        for number, finite in enumerate(chunk.finite):
            if not bool(finite):
                seen.append(_Sighting(number, chunk.start, _nodes(chunk), _samples(microbatches, number, 1)))
                break
    values = ", ".join(f"{name} {value}" for name, value in result.losses.items())
    return f"iteration {iteration}: {values}{_first(pipeline, seen)}"


def explain_gradient(pipeline: Pipeline, norm: float, microbatches: list[Microbatch], iteration: int) -> str:
    """Where a gradient norm that is not finite comes from: rank, stage, parameter, microbatch and its samples.

    The gradient of a step is a sum over microbatches and processes, so its microbatches are run again one by one
    (under the interleaved schedule, as many at a time as there are stages). Gradients are lost. Collective.
    """
    text = f"iteration {iteration}: the gradient norm is {norm}"
    reduced = [name for chunk in pipeline.bare_chunks for name in _not_finite(chunk)]
    finalize, pipeline.config.finalize_model_grads_func = pipeline.config.finalize_model_grads_func, None
    several = pipeline.sizes.pp if pipeline.sizes.vpp > 1 else 1
    seen, found = [], ""
    for number in range(0, len(microbatches), several):
        for chunk in pipeline.chunks:
            chunk.zero_grad_buffer()
        run_batch(pipeline, microbatches[number : number + several])
        for chunk in pipeline.bare_chunks:
            names = _not_finite(chunk)
            if names:  # the backward pass reaches later chunks first
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                where = f"{_nodes(chunk)}, parameter {names[0]}{more}"
                seen.append(_Sighting(number, -chunk.start, where, _samples(microbatches, number, several)))
        found = _first(pipeline, seen)
        if found:
            break
    pipeline.config.finalize_model_grads_func = finalize
    if found:
        return text + found
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, reduced[:1])
    named = [f"rank {rank}: {names[0]}" for rank, names in enumerate(everyone) if names]
    return f"{text}; no microbatch gives one by itself; {'; '.join(named[:8]) or 'every single gradient is finite'}"


@dataclass(frozen=True, order=True)
class _Sighting:
    """Something that is not finite; the smallest is the first."""

    microbatch: int
    start: int
    """First node of the chunk; negative where later chunks come first."""
    where: str
    samples: str


def _first(pipeline: Pipeline, seen: list[_Sighting]) -> str:
    """The first sighting of all processes in words, or nothing. Collective."""
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, min(seen, default=None))
    found = [(sighting, rank) for rank, sighting in enumerate(everyone) if sighting is not None]
    if not found:
        return ""
    first, rank = min(found)
    stage = pipeline.cuts.index(abs(first.start)) % pipeline.sizes.pp
    return f"; first seen on rank {rank}, pipeline stage {stage} ({first.where}), {first.samples}"


def _nodes(chunk: PipelineChunk) -> str:
    return f"{chunk.nodes[0].name} … {chunk.nodes[-1].name}"


def _samples(microbatches: list[Microbatch], first: int, several: int) -> str:
    ids = [name for batch in microbatches[first : first + several] for name in batch.sample_ids]
    which = f"microbatch {first}" if several == 1 else f"microbatches {first}-{first + several - 1}"
    return f"{which}, samples " + ", ".join(ids[:20]) + (f" and {len(ids) - 20} more" if len(ids) > 20 else "")


def _not_finite(chunk: PipelineChunk) -> list[str]:
    """Parameters of a chunk whose gradients are not finite."""
    return [
        f"{node.name}.{name}"
        for node, module in zip(chunk.nodes, chunk.node_modules)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and not bool(torch.isfinite(parameter.main_grad).all())
    ]
