"""The training run of one process: build, resume, step, validate, save.

    Config → layout → data and model → [microbatches → run_batch → optimizer] … → checkpoints

Where nodes begin to learn (models/phases.py), model and optimizer are built anew from the checkpoint of that iteration.
Every process runs this same code; what differs is the chunk it holds and the samples it reads.
"""

from __future__ import annotations

import gc
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mm.checkpoints import checkpoint
from megatron_mm.checkpoints import folder as checkpoint_folder
from megatron_mm.checkpoints.checkpoint import Position
from megatron_mm.checkpoints.local import LocalCopies, LocalSet
from megatron_mm.checkpoints.own_files import DamagedError
from megatron_mm.checkpoints.save import SaveError, Saver
from megatron_mm.config.load import dump_config
from megatron_mm.config.schema import Config
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.data.reading.dataset import build_datasets
from megatron_mm.data.reading.loader import MicrobatchLoader
from megatron_mm.data.reading.microbatch import Microbatch
from megatron_mm.data.reading.order import TaskSchedule
from megatron_mm.models.layers import attention_kernels
from megatron_mm.models.phases import phase_ends
from megatron_mm.pipeline.schedule import BatchResult, run_batch
from megatron_mm.planner.assembly import Assembly
from megatron_mm.planner.costs import model_flops
from megatron_mm.platform import setup
from megatron_mm.training import warm_start
from megatron_mm.training.corrupt_media import CorruptMedia
from megatron_mm.training.identity import checkpoint_root
from megatron_mm.training.optimizer import Optimizer
from megatron_mm.training.resilience import NotFiniteError, explain_gradient, explain_loss
from megatron_mm.training.shared_reading import SharedLoader
from megatron_mm.training.start import start
from megatron_mm.training.stop import Patience, Stop
from megatron_mm.training.tracking import Tracker, peak_tflops
from megatron_mm.training.validation import Validation


class Trainer:
    """A run, from its configuration.

    Args:
        config: checked against `sizes`.

    Raises:
        ValueError: the data or a checkpoint is wrong; the message names it.
    """

    def __init__(self, config: Config, sizes: ParallelSizes) -> None:
        self.config, self.sizes = config, sizes
        self.device, self.watchdog = start(config, sizes)
        self.stop, self.patience = Stop(), Patience()
        self.first_rank = dist.get_rank() == 0
        self.output = Path(config.logging.output)
        self.root = checkpoint_root(config)
        if self.first_rank:
            self.root.mkdir(parents=True, exist_ok=True)
            dump_config(config, self.output / "config.yaml")
        self.watchdog.beat("opening the data")
        self.datasets = build_datasets(config)
        self.corrupt = CorruptMedia(config)
        self._check_vocabulary()
        self._say(*self.datasets.report_lines())
        self.local = LocalCopies.of(config, self.root)
        self.position = self._start()
        self._say(self._describe(), f"attention: {'; '.join(self._attention())}")

    def _start(self) -> Position:
        """Model, optimizer and position: of the newest checkpoint that is whole when it is read, or of a new run."""
        settings = self.config.checkpoint
        load = Path(settings.load) if settings.load else self.root
        passed_over: dict[Path | LocalSet, str] = {}
        while True:
            local = self.local.newest(passed_over) if self.local and not settings.load else None
            folder = checkpoint.find(load, passed_over, local)
            if folder is None and settings.load:
                raise ValueError(f"checkpoint.load: {load} holds no whole checkpoint")
            iteration = 0 if folder is None else checkpoint.iteration_of(folder)
            self._build(iteration, self.config.training.seed)
            self.watchdog.beat("loading weights")
            if folder is None:
                self._set_aside_local(0)
                return self._begin()
            try:
                return self._resume(folder)
            except DamagedError as error:
                if folder == load:
                    raise
                self._say(f"warning: a damaged checkpoint is passed over: {error}")
                passed_over[folder] = str(error)
            self._drop()

    def _build(self, iteration: int, seed: int | None) -> None:
        """Model and optimizer of the phase that follows `iteration` steps."""
        self.watchdog.beat("building the model")
        self.assembly = Assembly.of(self.config, self.sizes, self.device.type, iteration)
        self.pipeline = self.assembly.build(self.device, seed)
        Validation(self.pipeline)  # a measure that it would refuse is refused before any step
        self.optimizer = Optimizer(self.config, self.pipeline)
        # MFU counts useful work: the same nodes without what context and tensor parallel processes repeat.
        self.plain_graph = Assembly.of(self.config, ParallelSizes(), iteration=iteration).graph

    def _check_vocabulary(self) -> None:
        """The embedding has a row for each piece, and at most what pads them to a multiple of 1024."""
        if self.datasets.tokenizer is None:
            return
        pieces, rows = self.datasets.tokenizer.vocab_size, self.config.model.inputs.vocab_size
        most = -(-pieces // 1024) * 1024
        if not pieces <= rows <= most:
            raise ValueError(
                f"the model's vocab_size is {rows}; the {pieces} pieces of {self.config.data.tokenizer} need "
                f"{pieces} to {most} (padded to a multiple of 1024)"
            )

    def _say(self, *lines: str) -> None:
        if self.first_rank and lines:
            print(*lines, sep="\n", flush=True)

    def _describe(self) -> str:
        own = sum(p.numel() for chunk in self.pipeline.bare_chunks for p in chunk.parameters())
        sizes = self.sizes
        layout = f"TP{sizes.tp} PP{sizes.pp} VPP{sizes.vpp} CP{sizes.cp} DP{sizes.dp}"
        layout += " +SP" if sizes.sequence_parallel else ""
        names = [node.name for node in self.pipeline.graph.nodes]
        cuts = " | ".join(names[cut] for cut in self.pipeline.cuts[:-1])
        return f"{layout} on {self.device.type}; {own:,} parameters on rank 0; chunks begin at {cuts}"

    def _attention(self) -> list[str]:
        """Attention of all stages and the kernels that compute it."""
        modules = (module for chunk in self.pipeline.bare_chunks for module in chunk.modules())
        lines = attention_kernels.describe(modules, self.assembly.settings, self.config.data.seq_length)
        everywhere: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(everywhere, lines)
        return sorted({line for lines in everywhere for line in lines})

    def _set_aside_local(self, iteration: int) -> None:
        if self.local:
            self._say(self.local.describe(), *self.local.set_aside_later(iteration))

    def _resume(self, folder: Path | LocalSet) -> Position:
        position = checkpoint.load(folder, self.pipeline, self.optimizer)
        if self.first_rank:
            for aside in checkpoint_folder.set_aside_later(self.root, position.iteration):
                print(f"set aside {aside}: the run goes on from iteration {position.iteration}", flush=True)
        self._set_aside_local(position.iteration)
        self._say(f"resumed from {folder} at iteration {position.iteration}")
        if isinstance(folder, Path):
            self._say(*self.patience.lines(checkpoint_folder.recorded_seconds(folder)))
        return position

    def _begin(self) -> Position:
        settings = self.config.checkpoint
        if settings.init_from:
            sources = [checkpoint_folder.resolve(folder) for folder in settings.init_from]
            rows = warm_start.load_pretrained(sources, self.pipeline, self.optimizer, settings.init_nodes)
            self._say(f"weights of {' and '.join(map(str, sources))} are the start:", warm_start.table(rows))
        return Position()

    def _loader(
        self, dataset, consumed: int, workers: int, fields: frozenset[str]
    ) -> MicrobatchLoader | SharedLoader:
        training = self.config.training

        def make() -> MicrobatchLoader:
            return MicrobatchLoader(
                dataset,
                consumed_samples=consumed,
                micro_batch_size=training.micro_batch_size,
                data_parallel_rank=parallel_state.get_data_parallel_rank(),
                data_parallel_size=self.sizes.dp,
                global_batch_size=training.global_batch_size,
                fields=fields,
                num_workers=workers,
                tasks=TaskSchedule(self.config.model.inputs.tasks, training.seed),
            )

        if self.sizes.tp == 1:
            return make()
        return SharedLoader(make, training.global_batch_size // (training.micro_batch_size * self.sizes.dp))

    def run(self) -> Position:
        """Trains to the last iteration, or until a signal; the last state is saved either way.

        Told to stop, the processes finish the step in hand, leave out or break off its validation, and save.

        Raises:
            NotFiniteError: a loss or gradient is NaN or infinite; the weights are those of the step before.
            SaveError: the last checkpoint could not be written.
        """
        config, training, position = self.config, self.config.training, self.position
        if position.iteration >= training.train_iters:
            self._say(f"nothing to do: iteration {position.iteration} of {training.train_iters} is done")
            self.watchdog.stop()
            return position
        tracker = Tracker(config, self.first_rank, position.iteration)
        saver = Saver(config, self.root, config.checkpoint.async_save, self.local, position.iteration)
        loader = self._train_loader()
        phases, stopped, prepared = phase_ends(config.optimizer.groups), False, False
        try:
            while position.iteration < training.train_iters and not stopped:
                self.watchdog.beat(f"iteration {position.iteration + 1}")
                figures = self._step(loader)
                stopped = self.stop.agreed()
                last = position.iteration == training.train_iters
                due = training.eval_interval and (position.iteration % training.eval_interval == 0 or last)
                if due and not stopped:
                    figures.update(self.validate())
                    stopped = self.stop.agreed()
                tracker.record(figures)
                if not prepared:  # now that the optimizer has its state
                    self._say(*saver.prepare(self.pipeline, self.optimizer))
                    prepared = True
                self._go_on_saving(saver)
                interval, ended = config.checkpoint.save_interval, position.iteration in phases
                if last or stopped or ended or (interval and position.iteration % interval == 0):
                    self._save(saver, needed=last or stopped or ended)
                    stopped = stopped or self._stops_here(saver)
                elif saver.local_is_due(position.iteration):
                    self._save(saver, needed=False, locally=True)
                if ended and not (last or stopped):
                    loader.close()
                    self._next_phase()
                    loader, prepared = self._train_loader(), False
                    stopped = self.stop.agreed()  # nothing has changed since that checkpoint
        finally:
            loader.close()
            tracker.close()
            saver.close()
            self.watchdog.stop()
        self._say(*self.corrupt.report_lines())
        verb = "finished" if position.iteration == training.train_iters else "stopped by a signal"
        self._say(f"{verb} at iteration {position.iteration}; metrics in {self.output}, checkpoints in {self.root}")
        return position

    def _train_loader(self) -> MicrobatchLoader | SharedLoader:
        consumed, workers = self.position.consumed_samples, self.config.data.num_workers
        return self._loader(self.datasets.train, consumed, workers, self.pipeline.fields())

    def _next_phase(self) -> None:
        """Goes on from the checkpoint just written with another part of the model frozen, cut and sharded anew."""
        iteration = self.position.iteration
        self._drop()
        self._build(iteration, seed=None)
        self.watchdog.beat("loading weights")
        checkpoint.load(checkpoint_folder.folder_of(self.root, iteration), self.pipeline, self.optimizer)
        self._say(f"iteration {iteration}: nodes that were frozen learn from here on; {self._describe()}")

    def _drop(self) -> None:
        """Lets go of model and optimizer, before the next are built: both would not fit."""
        del self.pipeline, self.optimizer
        gc.collect()
        torch.cuda.empty_cache()

    def _step(self, loader: MicrobatchLoader | SharedLoader) -> dict:
        """One optimizer step; its figures."""
        began = time.perf_counter()
        training, position = self.config.training, self.position
        microbatches = [next(loader) for _ in range(loader.num_microbatches)]
        waited = time.perf_counter() - began
        corrupt = self.corrupt.count(microbatches)
        iteration = position.iteration + 1
        if self.config.model.hidden_dropout or self.config.model.attention_dropout:
            setup.seed_dropout(training.seed, iteration)
        self.optimizer.zero_grad()
        result = run_batch(self.pipeline, microbatches)
        if not math.isfinite(result.total):
            raise NotFiniteError(explain_loss(self.pipeline, result, microbatches, iteration))
        norm = self.optimizer.gradient_norm()
        if not math.isfinite(norm):
            raise NotFiniteError(explain_gradient(self.pipeline, norm, microbatches, iteration))
        self.optimizer.step(norm, training.global_batch_size)
        position.iteration = iteration
        position.consumed_samples += training.global_batch_size
        return {**self._figures(result, norm, microbatches, time.perf_counter() - began, waited), **corrupt}

    def _figures(
        self, result: BatchResult, norm: float, microbatches: list[Microbatch], seconds: float, waited: float
    ) -> dict:
        tokens = self.config.training.global_batch_size * self.config.data.seq_length
        figures = {
            "iteration": self.position.iteration,
            "consumed_samples": self.position.consumed_samples,
            "loss": result.total,
            **({f"loss_{name}": value for name, value in result.losses.items()} if len(result.counts) > 1 else {}),
            **{f"{name}_count": count for name, count in result.counts.items()},
            "grad_norm": norm,
            "learning_rate": self.optimizer.learning_rate,
            "tokens_per_second": tokens / seconds,
            "iteration_time": seconds,
            "data_time": waited,
        }
        peak = peak_tflops(self.config)
        if peak:
            flops = sum(model_flops(self.plain_graph, batch.plan) for batch in microbatches) * self.sizes.dp
            figures["mfu"] = flops / seconds / (peak * 1e12 * self.sizes.world)
        if self.device.type == "cuda":  # tensors of rank 0, at most; the dry run's first stage is what it is to be
            figures["max_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self.config.data.log_sample_ids:
            figures["sample_ids"] = self._sample_ids(microbatches)
        return figures

    def _sample_ids(self, microbatches: list[Microbatch]) -> list[str]:
        """Document ids of the global batch in global order. Collective over data parallel."""
        own = [batch.sample_ids for batch in microbatches]
        group = parallel_state.get_data_parallel_group()
        everyone: list = [None] * self.sizes.dp
        dist.all_gather_object(everyone, own, group=group)
        return [name for pool in zip(*everyone) for ids in pool for name in ids]

    def validate(self) -> dict:
        """Losses and measures over `training.eval_iters` global batches of the validation split, always the same.

        Nothing where there is no such split, and where the run is told to stop meanwhile.
        """
        if self.datasets.valid is None or self.config.training.eval_iters < 1:
            return {}
        for chunk in self.pipeline.chunks:
            chunk.eval()
        validation = Validation(self.pipeline)
        loader = self._loader(self.datasets.valid, 0, 0, validation.fields)
        for number in range(self.config.training.eval_iters):
            self.watchdog.beat(f"validation batch {number + 1} after iteration {self.position.iteration}")
            microbatches = [next(loader) for _ in range(loader.num_microbatches)]
            self.corrupt.count(microbatches)
            validation.add(microbatches)
            if self.stop.agreed():
                break
        loader.close()
        for chunk in self.pipeline.chunks:
            chunk.train()
        if self.stop.agreed():
            return {}
        figures = validation.figures()
        if line := validation.console_line():
            self._say(line)
        return figures

    def _go_on_saving(self, saver: Saver) -> None:
        """Looks after a checkpoint that is being written. Collective."""
        try:
            folder = saver.poll()
        except SaveError as error:
            self._say(f"warning: {error}; training goes on, earlier checkpoints are whole")
        else:
            self._say_saved(saver, folder)

    def _save(self, saver: Saver, needed: bool, locally: bool = False) -> None:
        """Begins to save, once what is being written is there; where it is needed, returns when it is there."""
        self.watchdog.beat(f"saving iteration {self.position.iteration}")
        try:
            if saver.busy:
                began = time.perf_counter()
                self._say_saved(saver, saver.wait())
                self._say(f"training waited {time.perf_counter() - began:.1f} s for that before the next save")
        except SaveError as error:
            self._say(f"warning: {error}")
        try:
            folder = saver.begin(self.pipeline, self.optimizer, self.position, locally)
            self._say_saved(saver, folder or (saver.wait() if needed else None))
        except SaveError as error:
            if needed:  # nothing will try again: whoever started the run must know
                raise
            self._say(f"warning: {error}; training goes on, earlier checkpoints are whole")

    def _stops_here(self, saver: Saver) -> bool:
        """Whether the run was told to stop while it saved this step; it is there then, and need not be saved again.

        Raises:
            SaveError: it could not be written.
        """
        if not (saver.busy or saver.iteration == self.position.iteration) or not self.stop.agreed():
            return False
        self._say_saved(saver, saver.wait())
        return True

    def _say_saved(self, saver: Saver, folder: Path | None) -> None:
        if folder is not None:
            slow = self.patience.lines(saver.seconds) if folder.parent == self.root else ()
            self._say(f"saved {folder} ({saver.seconds:.1f} s)", *slow)
