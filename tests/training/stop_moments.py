"""Runs of two processes that are stopped at random moments as schedulers stop them: by a signal to every process.

    python -m tests.training.stop_moments --rounds 20 --before 5 --workers 0 1 2

Rounds are told to stop after the first step, some of them while they validate or save: each must leave its last step in
a checkpoint. Those before the first step must leave none. All ranks must end with status 0, and nothing may go on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_mm.checkpoints import folder as checkpoint_folder
from megatron_mm.config.load import dump_config
from megatron_mm.config.section import changed
from tests.support.corpus import build_corpus, corpus_config
from tests.support.programs import INTERPRETER
from tests.support.waiting import HANG_SECONDS, wait_until

ROOT = Path(__file__).resolve().parents[2]


class Run:
    """A run of two processes under a real torchrun, each of them a real interpreter, with real parents.

    Args:
        corpus: dataset and tokenizer of `build_corpus`.
        folder: takes its output.
        words: more of the command line.
    """

    def __init__(self, corpus: tuple[Path, Path], folder: Path, *words: str, **environment: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        training = {"training.train_iters": 1000000, "checkpoint.keep_last": 2, "checkpoint.save_interval": 0}
        dump_config(changed(corpus_config(*corpus, folder), training), folder / "recipe.yaml")
        launcher = ["-m", "tests.support.watched_torchrun", str(folder / "statuses"), "--standalone"]
        program = ["--nproc-per-node", "2", "pretrain_multimodal.py", "--config", str(folder / "recipe.yaml")]
        # Runs of a suite share two cores with others: none is killed because it takes long to save.
        given = {"PYTHONPATH": str(ROOT), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(HANG_SECONDS)), **environment}
        self.launcher = subprocess.Popen(
            [INTERPRETER, *launcher, *program, *words],
            cwd=ROOT,
            env={**os.environ, **given},
            stdout=(folder / "said").open("w"),
            stderr=(folder / "told").open("w"),
        )

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, once they are there."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.launcher.pid).children()
        return []

    def wait_for_ranks(self) -> None:
        """Waits until both have taken over their signals: what begins earlier ends as an interpreter does."""
        wait_until(lambda: len(self.ranks()) == 2, "the ranks", self.launcher)
        wait_until(lambda: all(_takes_signals(rank) for rank in self.ranks()), "their signals", self.launcher)

    def wait_for_steps(self, steps: int) -> None:
        """Waits for so many lines of metrics.jsonl."""
        wait_until(lambda: len(self.metrics()) >= steps, f"{steps} steps", self.launcher)

    def metrics(self) -> list[dict]:
        """The lines of metrics.jsonl that are whole."""
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []

    def processes(self) -> list[psutil.Process]:
        """The launcher, the ranks and what these have started."""
        launcher = psutil.Process(self.launcher.pid)
        return [launcher, *launcher.children(recursive=True)]

    def signal(self, number: signal.Signals) -> list[psutil.Process]:
        """Sends a signal to all processes, and returns them."""
        processes = self.processes()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        return processes

    def wait(self, processes: list[psutil.Process]) -> None:
        """Waits until all have ended."""
        self.launcher.wait(HANG_SECONDS)
        _, alive = psutil.wait_procs(processes, HANG_SECONDS)
        assert not alive, alive

    def statuses(self) -> dict[str, int]:
        """Exit status of each rank, by its number; of a launcher that could write them."""
        return json.loads((self.folder / "statuses").read_text())

    def saved(self) -> int | None:
        """Iteration of the newest whole checkpoint."""
        folder, problems = checkpoint_folder.newest_whole(self.folder / "checkpoints")
        assert not problems, problems
        return None if folder is None else checkpoint_folder.recorded_iteration(folder)

    def told(self) -> str:
        """Standard error."""
        return (self.folder / "told").read_text()


def _takes_signals(process: psutil.Process) -> bool:
    """Whether a process has SIGTERM blocked: on Linux, the only system on which these tests run."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("SigBlk:"):
                return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


@dataclass
class Stopped:
    """What a stopped run has left."""

    steps: int
    """Of metrics.jsonl."""
    saved: int | None
    statuses: dict[str, int]
    seconds: float
    """From the signal to the end of the last process."""

    @property
    def is_right(self) -> bool:
        """Whether the last step is in a checkpoint, and both ranks ended well; without a step, that there is none."""
        return self.saved == (self.steps or None) and self.statuses == {"0": 0, "1": 0}


def stopped(run: Run) -> Stopped:
    """Tells all processes of a run to stop, and waits for their end."""
    began = time.monotonic()
    run.wait(run.signal(signal.SIGTERM))
    return Stopped(len(run.metrics()), run.saved(), run.statuses(), time.monotonic() - began)


#: A checkpoint every third step, a validation every fifth: many moments are within one.
_WORDS = ("--save-interval", "3", "--training.eval-interval", "5", "--training.eval-iters", "2")


def after_first_step(corpus: tuple[Path, Path], folder: Path, workers: int, dice: random.Random) -> Stopped:
    """A run that is stopped within two seconds of its first line."""
    run = Run(corpus, folder, "--num-workers", str(workers), *_WORDS)
    run.wait_for_steps(1)
    time.sleep(dice.random() * 2)
    return stopped(run)


def before_first_step(corpus: tuple[Path, Path], folder: Path, workers: int, wait: float) -> Stopped:
    """A run that is stopped so many seconds after its ranks have begun."""
    run = Run(corpus, folder, "--num-workers", str(workers), *_WORDS)
    run.wait_for_ranks()
    until = time.monotonic() + wait
    while time.monotonic() < until and not run.metrics():
        time.sleep(0.01)
    return stopped(run)


def start_seconds(corpus: tuple[Path, Path], folder: Path) -> float:
    """From the beginning of the ranks to the first line of a run."""
    run = Run(corpus, folder, *_WORDS)
    run.wait_for_ranks()
    began = time.monotonic()
    run.wait_for_steps(1)
    took = time.monotonic() - began
    stopped(run)
    return took


def main() -> None:
    """Counts what is right, and ends with status 1 where something is not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="runs for each number of workers, after the first step")
    parser.add_argument("--before", type=int, default=5, help="runs for each, before it")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="of the data loader")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    words = parser.parse_args()
    dice, wrong = random.Random(words.seed), 0
    with tempfile.TemporaryDirectory(prefix="stop-moments-") as scratch:
        corpus = build_corpus(Path(scratch, "corpus"))
        starts = start_seconds(corpus, Path(scratch, "measured")) if words.before else 0.0
        for workers in words.workers:
            for when, rounds in (("after", words.rounds), ("before", words.before)):
                found = []
                for number in range(rounds):
                    folder = Path(scratch, f"{when}-{workers}-{number}")
                    if when == "after":
                        found.append(after_first_step(corpus, folder, workers, dice))
                    else:
                        found.append(before_first_step(corpus, folder, workers, 0.7 * starts * (number + 0.5) / rounds))
                    if not found[-1].is_right:
                        print(f"  wrong: {found[-1]}\n{(folder / 'told').read_text()[-3000:]}", flush=True)
                if found:
                    right, slowest = sum(one.is_right for one in found), max(one.seconds for one in found)
                    unsaved = sum(one.saved is None for one in found)
                    wrong += len(found) - right
                    print(
                        f"{workers} workers, {when} the first step: {right} of {rounds} right ({unsaved} without a "
                        f"checkpoint); the slowest took {slowest:.1f} s to end",
                        flush=True,
                    )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
