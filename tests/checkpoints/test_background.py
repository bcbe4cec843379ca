"""Writing in the background: what is there in the end, and what is left when a process or a disk fails.

The writer is stopped by SIGSTOP where a test needs it at work; nothing depends on how fast anything is.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from megatron_mm.checkpoints import checkpoint
from megatron_mm.checkpoints import folder as checkpoint_folder
from megatron_mm.checkpoints.background import BackgroundWriter
from megatron_mm.checkpoints.image import Image
from megatron_mm.checkpoints.save import SaveError, Saver
from megatron_mm.checkpoints.slots import Slot
from megatron_mm.platform import setup
from tests.pipeline import toy
from tests.support.checkpoints import plain_tensors
from tests.support.programs import PYTHON, TORCHRUN
from tests.support.waiting import wait_until


class Run:
    """A run of one process, whose weights change between saves."""

    def __init__(self, root: Path) -> None:
        setup.initialize(toy.sizes_of("DP1"), seed=5)
        self.pipeline, self.optimizer, config = toy.build(toy.Case())
        self.root, self.iteration = root, 0
        self.saver = Saver(config, root, in_background=True)
        self.step()
        assert self.saver.prepare(self.pipeline, self.optimizer) == []

    @property
    def writer(self) -> int:
        """Process id of the writer."""
        return self.saver._writer._process.pid

    def step(self) -> None:
        self.iteration += 1
        self.optimizer.zero_grad()
        toy.run_batch(self.pipeline, toy.microbatches_of(toy.Case(), self.iteration, toy.sizes_of("DP1")))
        self.optimizer.step(self.optimizer.gradient_norm(), 16)

    def begin(self) -> None:
        position = checkpoint.Position(self.iteration, 16 * self.iteration)
        assert self.saver.begin(self.pipeline, self.optimizer, position) is None

    def now(self) -> dict[str, torch.Tensor]:
        return {weight.key: weight.parameter.detach().clone() for weight in checkpoint.weights_of(self.pipeline)}

    @property
    def part(self) -> Path:
        return checkpoint_folder.folder_of(self.root, self.iteration).with_suffix(".part")


@pytest.fixture
def run(tmp_path) -> Iterator[Run]:
    made = Run(tmp_path)
    yield made
    made.saver.close()
    setup.shutdown()


@contextmanager
def stopped(process: int) -> Iterator[None]:
    os.kill(process, signal.SIGSTOP)
    wait_until(lambda: psutil.Process(process).status() == psutil.STATUS_STOPPED, "the writer is stopped")
    yield
    os.kill(process, signal.SIGCONT)


def holds(folder: Path, weights: dict[str, torch.Tensor]) -> bool:
    found = plain_tensors(folder)
    return all(torch.equal(found[key], value) for key, value in weights.items())


@pytest.mark.slow
def test_what_is_saved_is_what_was_there_when_it_began(run):
    with stopped(run.writer):
        run.begin()
        weights = run.now()
        run.step()  # training goes on
        assert run.saver.poll() is None and run.saver.busy
        assert not checkpoint_folder.checkpoints(run.root)
    folder = run.saver.wait()
    assert folder.name == "iter_0000001" and holds(folder, weights) and not holds(folder, run.now())
    assert checkpoint_folder.verify(folder, everything=True) is None
    assert checkpoint_folder.recorded_seconds(folder) > 0


def test_memory_is_kept_between_saves_and_not_counted_twice(run, monkeypatch):
    run.begin()
    run.saver.wait()
    writer, held = run.writer, run.saver._writer.held
    monkeypatch.setattr("megatron_mm.checkpoints.save._free_memory", lambda: 0)
    assert run.saver.prepare(run.pipeline, run.optimizer) == [], "as after a phase"
    run.step()
    run.begin()
    run.saver.wait()
    assert (run.writer, run.saver._writer.held) == (writer, held)


def test_without_memory_training_waits_and_says_why(tmp_path, monkeypatch):
    setup.initialize(toy.sizes_of("DP1"), seed=5)
    pipeline, optimizer, config = toy.build(toy.Case())
    monkeypatch.setattr("megatron_mm.checkpoints.save._free_memory", lambda: 1 << 10)
    saver = Saver(config, tmp_path, in_background=True)
    (said,) = saver.prepare(pipeline, optimizer)
    assert "while training waits: a copy of what" in said and "0.0 GiB that are free" in said
    folder = saver.begin(pipeline, optimizer, checkpoint.Position(3, 48))
    assert checkpoint_folder.verify(folder, everything=True) is None and not saver.busy
    setup.shutdown()


def test_a_writer_that_is_killed_costs_one_save(run):
    run.begin()
    before = run.saver.wait()
    run.step()
    with stopped(run.writer):
        run.begin()
        killed = run.writer
        os.kill(killed, signal.SIGKILL)
    with pytest.raises(SaveError, match=r"iter_0000002 was not written: .* ended with status -9"):
        run.saver.wait()
    assert not run.saver.busy and not run.part.exists()
    assert checkpoint_folder.newest_whole(run.root) == (before, [])
    run.step()
    run.begin()
    assert run.writer != killed
    assert holds(run.saver.wait(), run.now())


def test_a_writer_that_dies_between_saves_is_replaced(run):
    os.kill(run.writer, signal.SIGKILL)
    wait_until(lambda: not run.saver._writer.alive, "the writer has ended")
    run.begin()
    assert holds(run.saver.wait(), run.now())


def test_closing_after_a_writer_has_died_is_no_error(run):
    with stopped(run.writer):
        run.begin()
        os.kill(run.writer, signal.SIGKILL)
    wait_until(lambda: not run.saver._writer.alive, "the writer has ended")
    run.saver._writer.finish(run.part, {}, 0)
    run.saver.close()


def test_an_error_of_the_disk_is_told_and_the_next_save_works(run):
    with stopped(run.writer):
        run.begin()
        (run.part / "pieces_00000.safetensors").mkdir()
    with pytest.raises(SaveError, match=r"iter_0000001 was not written: FileExistsError"):
        run.saver.wait()
    writer = run.writer
    run.step()
    run.begin()
    assert holds(run.saver.wait(), run.now()) and run.writer == writer


def test_closing_while_it_writes_leaves_what_has_no_name(run):
    writer = run.writer
    with stopped(writer):
        run.begin()
        closing = threading.Thread(target=run.saver.close)
        closing.start()
        wait_until(lambda: run.saver._writer is None or run.saver._writer._process.stdin.closed, "the pipe is closed")
    closing.join()
    assert not psutil.pid_exists(writer)
    assert [path.name for path in run.root.iterdir()] == ["iter_0000001.part"]
    assert checkpoint_folder.newest_whole(run.root) == (None, [])


def test_a_second_file_is_written_after_the_first(tmp_path):
    """Of one writer, asked twice before it has begun."""
    writer = BackgroundWriter()
    with stopped(writer._process.pid):
        for number in range(2):
            image = Image([Slot("a", (4,), (0,), torch.full((4,), 1.0))])
            writer.write(image, tmp_path, number)
        assert writer.answered() is None
    wait_until(lambda: writer.answered() is not None, "it has written", writer._process)
    assert writer.answered()[0] is None
    assert len(list(tmp_path.iterdir())) == 4
    process = writer._process.pid
    writer.close()
    assert not psutil.pid_exists(process)


_RANK = """
import sys, time
import torch
from pathlib import Path
from megatron_mm.checkpoints.background import BackgroundWriter
writer = BackgroundWriter()
writer.reserve(1 << 20)
print(writer._process.pid, flush=True)
time.sleep(3600)
"""


def test_no_writer_outlives_its_rank():
    rank = subprocess.Popen([PYTHON, "-c", _RANK], stdout=subprocess.PIPE, encoding="utf-8", env={**os.environ})
    writer = psutil.Process(int(rank.stdout.readline()))
    assert writer.is_running()
    rank.kill()
    rank.wait()
    wait_until(lambda: not writer.is_running() or writer.status() == psutil.STATUS_ZOMBIE, "the writer has ended")


def save_while_a_writer_dies(root: str) -> None:
    """Run by each of two processes: the second's writer is killed during the second of three saves."""
    setup.initialize(toy.sizes_of("PP2"), seed=5)
    pipeline, optimizer, config = toy.build(toy.Case("PP2"))
    saver = Saver(config, Path(root), in_background=True)
    said = []
    for iteration in (1, 2, 3):
        saver.begin(pipeline, optimizer, checkpoint.Position(iteration, 16 * iteration))
        if iteration == 2 and setup.rank() == 1:
            saver._writer._process.kill()
            saver._writer._process.wait()
        try:
            said.append(saver.wait().name)
        except SaveError as error:
            said.append(f"{type(error).__name__}")
    saver.close()
    Path(root, f"rank_{setup.rank()}.txt").write_text(" ".join(said))
    setup.shutdown()


@pytest.mark.slow
def test_a_writer_of_one_process_dies_and_all_go_on(tmp_path):
    """The second save may have been done before the kill; the third works in any case, on both."""
    words = [*TORCHRUN, "2", "-m", "tests.checkpoints.test_background", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = ((tmp_path / f"rank_{rank}.txt").read_text().split() for rank in (0, 1))
    assert first == second and first[0] == "iter_0000001" and first[2] == "iter_0000003"
    assert first[1] in ("SaveError", "iter_0000002")
    assert checkpoint_folder.newest_whole(tmp_path)[0].name == "iter_0000003"


if __name__ == "__main__":
    save_while_a_writer_dies(sys.argv[1])


WRITE = """
import sys
from megatron_mm.checkpoints.writer import _watched
if sys.argv[1] == "ended":
    sys.stdin.read()
print(len(list(_watched(memoryview(bytes(10))))))
"""


@pytest.mark.parametrize(("rank", "said", "status"), [("lives", b"1\n", 0), ("ended", b"", 1)])
def test_a_writer_goes_on_with_its_file_as_long_as_its_rank_lives(rank, said, status):
    """What tells is the pipe of requests, whose other end a rank that was killed no longer holds."""
    process = subprocess.Popen([PYTHON, "-c", WRITE, rank], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    if rank == "ended":
        process.stdin.close()
    assert (process.stdout.read(), process.wait()) == (said, status)
