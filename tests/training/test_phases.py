"""Whole runs through an unfreezing, and runs that start from another's weights.

Truth is one process that is never interrupted.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_mm.config.load import dump_config
from megatron_mm.config.schema import NodeGroupConfig
from megatron_mm.config.section import changed
from tests.support.corpus import build_corpus, corpus_config
from tests.support.programs import PYTHON, TORCHRUN

pytestmark = pytest.mark.slow
STEPS, UNFREEZE = 8, 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build_corpus(tmp_path_factory.mktemp("corpus"))


def recipe(corpus, output: Path) -> Path:
    config = changed(
        corpus_config(*corpus, output),
        {
            "training.train_iters": STEPS,
            "optimizer.lr_decay_iters": STEPS,
            "checkpoint.save_interval": 2,
            "checkpoint.keep_last": 0,
            "optimizer.groups": [
                NodeGroupConfig(nodes=["vision.*"], frozen_iters=UNFREEZE, lr_scale=0.5),
                NodeGroupConfig(nodes=["audio.*"], frozen_iters=-1),
            ],
        },
    )
    output.mkdir(parents=True, exist_ok=True)
    path = output / "recipe.yaml"
    dump_config(config, path)
    return path


def run(path: Path, processes: int = 1, *words: str) -> subprocess.CompletedProcess:
    launcher = [*TORCHRUN, str(processes)]
    launcher = launcher if processes > 1 else [PYTHON]
    command = [*launcher, "pretrain_multimodal.py", "--config", str(path), *words]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False)


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted")
    done = run(recipe(corpus, output))
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"iteration {UNFREEZE}: nodes that were frozen learn from here on" in done.stdout
    return output


def assert_same_history(output: Path, uninterrupted: Path) -> None:
    ours, theirs = metrics(output), metrics(uninterrupted)
    assert [line["iteration"] for line in ours] == list(range(1, STEPS + 1))
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), a["iteration"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4), a["iteration"]
        assert a["sample_ids"] == b["sample_ids"] and a["consumed_samples"] == b["consumed_samples"]


def test_the_frozen_do_not_move_until_they_learn(uninterrupted):
    from megatron_mm.config.sizes import ParallelSizes
    from megatron_mm.platform import setup
    from tests.support.checkpoints import plain_tensors

    setup.initialize(ParallelSizes(), seed=1)
    before, at, last = (plain_tensors(str(uninterrupted / "checkpoints" / f"iter_000000{n}")) for n in (2, 4, 8))

    def moved(one: dict, two: dict) -> set[str]:
        names = [key for key, value in one.items() if isinstance(value, torch.Tensor) and "optimizer." not in key]
        return {name.split(".")[0] for name in names if not torch.equal(one[name], two[name])}

    assert moved(before, at) == {"decoder"} and moved(at, last) == {"decoder", "vision"}
    assert "optimizer.exp_avg.decoder.output.final_layernorm.weight" in at
    assert not any(key.startswith("optimizer.exp_avg.vision.") for key in at)
    assert any(key.startswith("optimizer.exp_avg.vision.") for key in last)


def test_through_the_unfreezing_in_a_pipeline_and_on_elsewhere(corpus, uninterrupted, tmp_path):
    """PP2 crosses it (the cut moves with what learns), then two data-parallel shards of the optimizer go on."""
    path = recipe(corpus, tmp_path)
    first = run(path, 2, "--pipeline-model-parallel-size", "2", "--train-iters", "6")
    assert first.returncode == 0, first.stderr[-2000:]
    cuts = [line.rpartition("chunks begin at ")[2] for line in first.stdout.splitlines() if "chunks begin at" in line]
    assert len(cuts) == 2
    second = run(path, 2, "--use-distributed-optimizer", "--micro-batch-size", "1")
    assert second.returncode == 0, second.stderr[-2000:]
    assert_same_history(tmp_path, uninterrupted)


def test_resumed_before_it(corpus, uninterrupted, tmp_path):
    path = recipe(corpus, tmp_path)
    assert run(path, 1, "--train-iters", "3").returncode == 0
    second = run(path, 2, "--use-distributed-optimizer", "--micro-batch-size", "1")
    assert second.returncode == 0, second.stderr[-2000:]
    assert "nodes that were frozen learn" in second.stdout
    assert_same_history(tmp_path, uninterrupted)


def test_resumed_at_it(corpus, uninterrupted, tmp_path):
    path = recipe(corpus, tmp_path)
    shutil.copytree(uninterrupted / "checkpoints" / "iter_0000004", tmp_path / "checkpoints" / "iter_0000004")
    shutil.copy(uninterrupted / "metrics.jsonl", tmp_path)
    done = run(path)
    assert done.returncode == 0 and "nodes that were frozen learn" not in done.stdout
    assert_same_history(tmp_path, uninterrupted)


def test_named_nodes_start_from_another_run(corpus, uninterrupted, tmp_path):
    """Over two stages: the table has every node, whichever stage holds it."""
    words = ["--init-from", str(uninterrupted / "checkpoints"), "--init-nodes", "vision.*", "decoder.embedding"]
    done = run(recipe(corpus, tmp_path), 2, *words, "--pipeline-model-parallel-size", "2", "--train-iters", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split("  ") for line in done.stdout.splitlines() if line.startswith("  ")]
    table = {words[1]: words[-1].strip() for words in rows}
    assert table["vision.layers.0-1"] == table["decoder.embedding"] == "loaded"
    assert table["decoder.layers.0-3"] == table["audio.layers.0-1"] == "initialised: not among checkpoint.init_nodes"
    refused = run(recipe(corpus, tmp_path / "b"), 1, *words[:3], "visio.*")
    assert refused.returncode == 1 and "'visio.*' matches no node of this model" in refused.stderr
