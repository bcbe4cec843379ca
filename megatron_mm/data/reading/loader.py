"""Microbatches of one data-parallel rank, read ahead by worker processes, in an order that ranks and workers share.

Global sample numbers are arithmetic: iteration n takes the numbers after consumed_samples + n × global batch; within
it microbatch m takes micro_batch_size × data-parallel size consecutive ones (the pool), and rank d its slice. Nothing
is stored, so the loader is resumed by giving it `consumed_samples`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from multiprocessing.util import Finalize

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data._utils import signal_handling

from megatron_mm.data.reading.dataset import Split
from megatron_mm.data.reading.microbatch import Microbatch
from megatron_mm.data.reading.order import TaskSchedule
from megatron_mm.media.errors import DataError


def microbatch_indexes(
    number: int,
    consumed_samples: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    global_batch_size: int,
) -> range:
    """Global sample numbers of a rank's microbatch.

    Args:
        number: of the microbatch of this rank since `consumed_samples`, from 0, counted through iterations.
        consumed_samples: samples of all ranks consumed before.
        micro_batch_size: samples a rank takes at once.
        data_parallel_rank: d.
        data_parallel_size: ranks.
        global_batch_size: samples of one iteration, a multiple of micro_batch_size × data_parallel_size.
    """
    pool = micro_batch_size * data_parallel_size
    iteration, m = divmod(number, global_batch_size // pool)
    start = consumed_samples + iteration * global_batch_size + m * pool + data_parallel_rank * micro_batch_size
    return range(start, start + micro_batch_size)


@dataclass(frozen=True)
class _Failure:
    """An error on its way from a worker, without the wrapping that DataLoader gives exceptions."""

    message: str


class _Microbatches(Dataset):
    """Map from microbatch number to microbatch."""

    def __init__(
        self, dataset: Split, fields: frozenset[str], layout: tuple[int, ...], tasks: TaskSchedule
    ) -> None:
        self.dataset, self.fields, self.layout, self.tasks = dataset, fields, layout, tasks

    def __getitem__(self, number: int) -> Microbatch | _Failure:
        _, micro_batch_size, _, data_parallel_size, _ = self.layout
        index = microbatch_indexes(number, *self.layout)
        task = self.tasks(index.start // (micro_batch_size * data_parallel_size))
        try:
            return self.dataset.microbatch(index, self.fields, task)
        except DataError as error:
            return _Failure(str(error))


class _Count(Sampler):
    """0, 1, 2, …"""

    def __init__(self) -> None:
        pass

    def __iter__(self) -> Iterator[int]:
        number = 0
        while True:
            yield number
            number += 1


#: Seconds that a worker gets to end by itself; one that reads from slow storage may need for ever.
_CLOSE_SECONDS = 3.0


def _start_worker(parent: int, _: int) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process once its parent has ended; torch looks only between microbatches, then waits for its pipe."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _disown(iterator) -> None:
    """Keeps torch's handler of SIGCHLD from making an error of workers that end."""
    if iterator._worker_pids_set:
        signal_handling._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False


def _kill(iterator) -> None:
    """Ends the workers of a DataLoader's iterator whatever they do.

    They may have blocked the signal that torch and multiprocessing would send them (platform/stopping.py).
    """
    _disown(iterator)
    for worker in iterator._workers:
        if worker.is_alive():
            worker.kill()


class _Ahead:
    """Takes from an iterator in a thread: what workers send is unpacked while the last microbatch trains."""

    def __init__(self, iterator: Iterator, depth: int = 2) -> None:
        self._taken: queue.Queue = queue.Queue(depth)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._take, args=(iterator,), name="microbatches", daemon=True)
        self._thread.start()

    def _take(self, iterator: Iterator) -> None:
        while not self._ended.is_set():
            try:
                item: object = next(iterator)
            except BaseException as error:  # of the iterator, or of what it runs: whoever waits for an item gets it
                item = error
            self._taken.put(item)
            if isinstance(item, BaseException):
                return

    def __next__(self):
        item = self._taken.get()
        if isinstance(item, BaseException):
            self._taken.put(item)  # for whoever asks again
            raise item
        return item

    def close(self) -> None:
        """Ends the thread; one that a stuck worker holds is left to end with the process."""
        self._ended.set()
        for _ in range(200):
            if not self._thread.is_alive():
                return
            with contextlib.suppress(queue.Empty):
                self._taken.get(timeout=0.05)


class MicrobatchLoader:
    """An endless iterator over the microbatches of one rank.

    Args:
        dataset: a split.
        consumed_samples: global samples consumed before the first microbatch.
        micro_batch_size: samples a rank takes at once.
        data_parallel_rank: this rank's number among those that share a batch.
        data_parallel_size: how many they are.
        global_batch_size: samples of an iteration.
        fields: optional fields that this process reads (`InputFormat.fields`).
        num_workers: reader processes; 0 reads in this one. The microbatches do not depend on it.
        prefetch_factor: microbatches read ahead by each worker.
        start_method: of the workers; "fork" shares what is open, "spawn" opens it again.
        tasks: which task each pool of samples learns; None: no tasks.

    Raises:
        ValueError: the batch sizes do not divide.
        DataError: from `__next__`: a record does not decode; dataset, record and cause are named.
    """

    def __init__(
        self,
        dataset: Split,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        global_batch_size: int,
        fields: Collection[str],
        num_workers: int = 0,
        prefetch_factor: int = 2,
        start_method: str = "fork",
        tasks: TaskSchedule | None = None,
    ) -> None:
        pool = micro_batch_size * data_parallel_size
        if pool <= 0 or global_batch_size <= 0 or global_batch_size % pool:
            raise ValueError(
                f"training.global_batch_size: {global_batch_size} must be a multiple of micro_batch_size × "
                f"data-parallel size = {micro_batch_size} × {data_parallel_size}"
            )
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ValueError(f"data_parallel_rank {data_parallel_rank} of {data_parallel_size}")
        self.num_microbatches = global_batch_size // pool
        """Microbatches of one iteration."""
        layout = (consumed_samples, micro_batch_size, data_parallel_rank, data_parallel_size, global_batch_size)
        workers = {}
        if num_workers:
            workers = {
                "num_workers": num_workers,
                "prefetch_factor": prefetch_factor,
                "multiprocessing_context": start_method,
                "worker_init_fn": functools.partial(_start_worker, os.getpid()),
            }
        microbatches = _Microbatches(dataset, frozenset(fields), layout, tasks or TaskSchedule((), 0))
        self._loader = DataLoader(microbatches, batch_size=None, sampler=_Count(), **workers)
        self._has_workers = num_workers > 0
        self._iterator: Iterator | None = None
        self._ahead: _Ahead | None = None
        self._killer: Finalize | None = None

    def __iter__(self) -> MicrobatchLoader:
        return self

    def __next__(self) -> Microbatch:
        if self._iterator is None:
            self._iterator = iter(self._loader)
            if self._has_workers:
                # Where nobody closes: at exit, before multiprocessing waits for workers.
                self._killer = Finalize(None, _kill, (self._iterator,), exitpriority=10)
                self._ahead = _Ahead(self._iterator)
        try:
            microbatch = next(self._ahead or self._iterator)
        except (EOFError, ConnectionError) as error:  # torch notices most such ends itself, but not all in time
            raise ChildProcessError(
                "a process that reads data died while it sent a microbatch (out of memory, or killed)"
            ) from error
        if isinstance(microbatch, _Failure):
            raise DataError(microbatch.message)
        return microbatch

    def close(self) -> None:
        """Ends the workers: those that do not end by themselves within seconds are killed."""
        timer = None
        if self._killer is not None:
            _disown(self._iterator)
            timer = threading.Timer(_CLOSE_SECONDS, self._killer)
            timer.start()
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
        shutdown = getattr(self._iterator, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()
        if timer is not None:
            timer.cancel()
            self._killer.cancel()
            self._killer = None
        self._iterator = None
