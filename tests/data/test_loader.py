"""Reading ahead: microbatches wait unpacked, errors of workers surface, and nothing is left running."""

from __future__ import annotations

import os
import signal
import threading

import psutil
import pytest

from megatron_mm.data.reading.dataset import build_datasets
from megatron_mm.data.reading.loader import MicrobatchLoader
from tests.support.waiting import wait_until


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "microbatches"]


def running() -> set[int]:
    """Child processes of this one that have not ended."""
    return {child.pid for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE}


@pytest.fixture
def others() -> set[int]:
    """Processes that have nothing to do with the loader."""
    return running()


@pytest.fixture
def loader(config, others):
    loader = MicrobatchLoader(build_datasets(config).train, 0, 2, 0, 1, 4, {"tokens_RT"}, num_workers=2)
    yield loader
    loader.close()


def test_microbatches_are_unpacked_before_they_are_asked_for(loader):
    """What `next` would otherwise wait for: the thread has taken two more from the workers."""
    next(loader)
    (thread,) = reading_threads()
    wait_until(lambda: loader._ahead._taken.qsize() == 2, "two microbatches are unpacked")
    assert thread.is_alive()


@pytest.fixture
def no_handler_of_torch():
    """torch's handler of SIGCHLD raises in whatever the main thread does, be it pytest's own code.

    It is back only after the loader, a fixture made later, is closed and has forgotten the worker.
    """
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGCHLD, before)


def test_a_worker_that_is_killed_ends_the_reading(others, no_handler_of_torch, loader):
    next(loader)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the first loader of a process sets it
    worker = min(running() - others)
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: worker not in running(), "the worker has ended")
    with pytest.raises(RuntimeError, match="worker"):  # what the thread was waiting for
        for _ in range(50):
            next(loader)
    with pytest.raises(RuntimeError, match="worker"):
        next(loader)  # and says so again


def test_close_ends_thread_and_workers(loader, others):
    next(loader)
    assert reading_threads() and len(running() - others) == 2
    loader.close()
    wait_until(lambda: not reading_threads() and not running() - others, "thread and workers have ended")
    loader.close()
