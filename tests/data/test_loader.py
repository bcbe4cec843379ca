"""Reading ahead: microbatches wait unpacked, errors of workers surface, and nothing is left running."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time

import psutil
import pytest

from megatron_mm.data.reading.dataset import build_datasets
from megatron_mm.data.reading.loader import MicrobatchLoader
from megatron_mm.platform.stopping import NUMBERS
from tests.support.programs import INTERPRETER
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
    with pytest.raises((RuntimeError, ChildProcessError), match=r"worker|reads data"):
        for _ in range(50):
            next(loader)
    with pytest.raises((RuntimeError, ChildProcessError), match=r"worker|reads data"):
        next(loader)  # and says so again


def test_close_ends_thread_and_workers(loader, others):
    next(loader)
    assert reading_threads() and len(running() - others) == 2
    loader.close()
    wait_until(lambda: not reading_threads() and not running() - others, "thread and workers have ended")
    loader.close()


@pytest.fixture
def blocked():
    """The signals that a training process takes in a thread of its own, and its children do not see."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_readers_outlive_the_signals_of_a_scheduler(blocked, loader, others):
    first = next(loader).sample_ids
    for worker in running() - others:
        for number in NUMBERS:
            os.kill(worker, number)
    assert all(next(loader).sample_ids != first for _ in range(20))
    assert len(running() - others) == 2
    loader.close()
    assert not running() - others


class StuckRows:
    """Storage that answers nobody."""

    def microbatch(self, index, fields, task):
        """Never comes."""
        time.sleep(86400)


@pytest.mark.slow
def test_close_ends_readers_that_wait_for_their_storage(blocked, others):
    loader = MicrobatchLoader(StuckRows(), 0, 2, 0, 1, 4, (), num_workers=2)

    def read() -> None:
        with contextlib.suppress(RuntimeError, ChildProcessError):  # a reader has died
            next(loader)

    reader = threading.Thread(target=read)
    reader.start()
    wait_until(lambda: len(running() - others) == 2 and loader._ahead, "the readers run")
    loader.close()
    reader.join()
    wait_until(lambda: not running() - others and not reading_threads(), "readers and thread have ended")


STUCK = """
import signal, threading, time
from megatron_mm.data.reading.loader import MicrobatchLoader
from megatron_mm.platform.stopping import NUMBERS
from tests.data.test_loader import StuckRows

signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
loader = MicrobatchLoader(StuckRows(), 0, 2, 0, 1, 4, (), num_workers=2)
threading.Thread(target=next, args=(loader,), daemon=True).start()
while not loader._ahead:
    time.sleep(0.01)
print(*(worker.pid for worker in loader._iterator._workers), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["exit", "kill"])
def test_readers_end_with_their_process(end):
    """One that exits without closing, and one that is killed; what they read never comes."""
    waits = "time.sleep(86400)" if end == "kill" else ""
    process = subprocess.Popen([INTERPRETER, "-c", STUCK + waits], stdout=subprocess.PIPE, encoding="utf-8")
    workers = [psutil.Process(int(number)) for number in process.stdout.readline().split()]
    assert len(workers) == 2
    if end == "kill":
        process.kill()
    process.wait()
    psutil.wait_procs(workers)
