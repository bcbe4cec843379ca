"""Runs under a real torchrun that schedulers stop, and one that has lost its launcher.

What is sent to every process of a node reaches the launcher, which passes it on, both ranks, and the readers of each.
"""

import random
import signal
import time

import pytest

from megatron_mm.platform import stopping
from tests.support.corpus import build_corpus
from tests.support.waiting import wait_until
from tests.training.stop_moments import Run, after_first_step, stopped

pytestmark = pytest.mark.slow
TO_BOTH = {"0": 0, "1": 0}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 2), (signal.SIGINT, 1), (signal.SIGUSR1, 0)])
def test_a_signal_to_every_process_ends_in_a_checkpoint(corpus, tmp_path, number, workers):
    """SIGUSR1 ends torchrun itself, at once and without a word to its processes."""
    run = Run(corpus, tmp_path / "run", "--num-workers", str(workers))
    run.wait_for_steps(1)
    run.wait(run.signal(number))
    assert run.saved() == len(run.metrics()) >= 1
    assert "the run ends when the step in hand is done and saved" in run.told() and "error:" not in run.told()
    assert "stopped by a signal at iteration" in (run.folder / "said").read_text()
    if number != signal.SIGUSR1:
        assert run.statuses() == TO_BOTH


def test_a_run_that_validates_stops_between_batches(corpus, tmp_path):
    """The validation is long enough to outlast any patience; it leaves no figures."""
    noted, words = tmp_path / "noted", ("--training.eval-interval", "2", "--training.eval-iters", "100000000")
    words = (*words, "--data.builder", "tests/training/noted_validation.py:build")
    run = Run(corpus, tmp_path / "run", *words, NOTED=str(noted))
    wait_until(noted.exists, "a validation", run.launcher)
    found = stopped(run)
    assert found.is_right and found.saved == 2
    assert not any("validation_loss" in line for line in run.metrics())


def test_before_the_first_step_nothing_is_saved(corpus, tmp_path):
    run = Run(corpus, tmp_path / "run", "--num-workers", "2")
    run.wait_for_ranks()
    found = stopped(run)
    assert found.is_right and found.saved is None
    assert run.told().count("stopped by SIGTERM before the first step: nothing is saved") == 1


def test_processes_whose_launcher_is_killed_end_unsaved(corpus, tmp_path):
    run = Run(corpus, tmp_path / "run", "--num-workers", "1")
    run.wait_for_steps(1)
    processes = run.processes()
    run.launcher.kill()
    run.wait(processes)
    assert run.saved() is None and run.told().count("is gone, so it ends; nothing is saved") == 2


def test_a_second_signal_ends_every_process_at_once(corpus, tmp_path):
    """While the storage of checkpoints does not answer."""
    noted, words = tmp_path / "noted", ("--data.builder", "tests/training/held_save.py:build", "--num-workers", "1")
    run = Run(corpus, tmp_path / "run", *words, NOTED=str(noted))
    run.wait_for_steps(1)
    processes = run.signal(signal.SIGTERM)
    wait_until(noted.exists, "the save", run.launcher)
    time.sleep(stopping.ECHO_SECONDS + 0.5)  # what comes earlier is an echo
    assert run.launcher.poll() is None
    run.signal(signal.SIGTERM)
    run.wait(processes)
    assert run.saved() is None and run.statuses() == {"0": 143, "1": 143}
    assert run.told().count("a second signal, SIGTERM: it ends at once") == 2


def test_a_random_moment(corpus, tmp_path):
    """The short form of `python -m tests.training.stop_moments`."""
    assert after_first_step(corpus, tmp_path / "run", 1, random.Random(1)).is_right
