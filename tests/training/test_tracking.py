"""Figures of a run, written by Tracker and read back by TensorBoard itself."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_mm.config.schema import Config, LoggingConfig
from megatron_mm.training.tracking import Tracker

pytestmark = pytest.mark.interface


def figures(iteration: int) -> dict:
    numbers = {"loss": 8.0 / iteration, "grad_norm": 0.5, "learning_rate": 1e-3, "tokens_per_second": 100.0}
    return {"iteration": iteration, **numbers, "iteration_time": 0.25, "sample_ids": [f"corpus/{iteration}"]}


def track(config: Config, iterations: range) -> None:
    tracker = Tracker(config, True, iterations.start - 1)
    for iteration in iterations:
        tracker.record(figures(iteration))
    tracker.close()


def test_tensorboard_reads_the_history_of_a_run_that_was_resumed(tmp_path, capsys):
    config = Config(logging=LoggingConfig(output=str(tmp_path)))
    track(config, range(1, 6))
    track(config, range(4, 7))  # resumed from a checkpoint of iteration 3: what came after it is written again
    assert "2 iterations after the checkpoint were dropped" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [figures(iteration) for iteration in range(1, 7)]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == figures(1).keys() - {"sample_ids"}
    for key in ("loss", "tokens_per_second"):
        read = [(event.step, event.value) for event in events.Scalars(key)]
        assert read == [(line["iteration"], pytest.approx(line[key])) for line in lines]


def test_other_ranks_write_nothing(tmp_path):
    tracker = Tracker(Config(logging=LoggingConfig(output=str(tmp_path / "none"))), False, 0)
    tracker.record(figures(1))
    tracker.close()
    assert not (tmp_path / "none").exists()
