"""Runs the toy system of toy.py in other layouts than one process."""

import dataclasses
import json
import os
import subprocess

import pytest
import torch

from tests.support.programs import TORCHRUN


@pytest.fixture
def train_in_processes(tmp_path):
    """Trains cases, all of the same number of processes, one after the other under one torchrun."""

    def run(processes: int, *cases) -> list[dict]:
        output = tmp_path / "results.pt"
        words = [*TORCHRUN, str(processes)]
        words += ["-m", "tests.pipeline.toy", json.dumps([dataclasses.asdict(case) for case in cases]), str(output)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        done = subprocess.run(words, capture_output=True, encoding="utf-8", env=environment, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return torch.load(output, weights_only=True)

    return run
