"""Whole runs on two nodes that keep local copies: a process is killed, and folders of nodes are gone.

Truth is the uninterrupted run of one process: its loss curve and its sample ids.
"""

import json
import shutil
from pathlib import Path

import pytest

from megatron_mm.config.load import dump_config
from megatron_mm.config.section import changed
from tests.support.corpus import build_corpus, corpus_config
from tests.support.nodes import run_agents, run_on_nodes

pytestmark = pytest.mark.slow
STEPS = 9
LAYOUT = ["--pipeline-model-parallel-size", "2", "--use-distributed-optimizer", "--micro-batch-size", "1"]


class Runs:
    """A run on nodes 0 and 1, two processes each, one of which is killed after step 7, and what followed it.

    Local copies were saved at steps 2, 4 and 7, the shared checkpoint at 5.
    """

    def __init__(self, folder: Path) -> None:
        self.corpus, self.place, self.left = build_corpus(folder / "corpus"), folder / "place", folder / "left"
        assert self.start([self.place / "alone"], 1, output="uninterrupted")[0].returncode == 0
        self.truth = self.metrics("uninterrupted")
        ended = self.start(self.nodes, 2, *LAYOUT, started_by=run_agents, KILLED="7 1")
        assert ended[0].returncode == 1 and "Signal 9 (SIGKILL)" in ended[0].stderr, ended[0].stderr[-3000:]
        self.said = ended[0].stdout
        shutil.copytree(self.place, self.left)

    @property
    def nodes(self) -> list[Path]:
        return [self.place / "node0", self.place / "node1"]

    def start(
        self, nodes: list[Path], processes: int, *words: str, output="run", started_by=run_on_nodes, **variables: str
    ):
        """Starts the run on nodes, again."""
        config = changed(
            corpus_config(*self.corpus, self.place / output),
            {
                "training.train_iters": STEPS,
                "checkpoint.save_interval": 5,
                "checkpoint.local_interval": 2,
                "optimizer.lr_decay_iters": STEPS,
                "data.builder": "tests/checkpoints/settled_data.py:build",
            },
        )
        (self.place / output).mkdir(parents=True, exist_ok=True)
        dump_config(config, path := self.place / output / "recipe.yaml")
        command = ["pretrain_multimodal.py", "--config", str(path), "--checkpoint.local-folder", "{local}", *words]
        return started_by(command, nodes, processes, OMP_NUM_THREADS="1", **variables)

    def metrics(self, output: str = "run") -> list[dict]:
        return [json.loads(line) for line in (self.place / output / "metrics.jsonl").read_text().splitlines()]

    def restore(self) -> None:
        """Everything is as the killed run left it."""
        shutil.rmtree(self.place)
        shutil.copytree(self.left, self.place)

    def sets(self, node: int) -> list[str]:
        """Names of what a node holds of this run."""
        return sorted(path.name for path in self.nodes[node].glob("run-*/*"))

    def goes_on(self, nodes: list[Path], processes: int, *words: str) -> str:
        """Starts the run again, which must come to its end as if nothing had been; what it said."""
        ended = self.start(nodes, processes, *words)
        assert all(process.returncode == 0 for process in ended), "\n".join(each.stderr[-2000:] for each in ended)
        found = self.metrics()
        assert [line["iteration"] for line in found] == list(range(1, STEPS + 1))
        for a, b in zip(found, self.truth, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), a["iteration"]
            assert a["sample_ids"] == b["sample_ids"] and a["consumed_samples"] == b["consumed_samples"]
        return ended[0].stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


def test_a_killed_process_and_a_lost_node_cost_the_steps_since_the_local_copies(runs):
    assert "local copies of checkpoints: 2 nodes" in runs.said
    assert runs.said.count("saved ") == 4 and "iter_0000007" in runs.said.rpartition("saved ")[2]
    runs.restore()
    assert runs.sets(0) == runs.sets(1) == ["iter_0000007"]
    shutil.rmtree(runs.nodes[1])
    said = runs.goes_on(runs.nodes, 2, *LAYOUT)
    assert "resumed from local copies " in said and "at iteration 7" in said
    assert (runs.place / "run" / "checkpoints" / "iter_0000009").is_dir(), "the last one is shared"


def test_without_local_copies_the_shared_checkpoint_is_used(runs):
    runs.restore()
    for node in runs.nodes:
        shutil.rmtree(node)
    assert "checkpoints/iter_0000005 at iteration 5" in runs.goes_on(runs.nodes, 2, *LAYOUT)


def test_another_layout_on_one_node_and_sets_of_another_run_in_its_folder(runs):
    """The other run's is newer; it is neither used nor removed, and of one node a lost node loses all."""
    runs.restore()
    (own,) = runs.nodes[0].glob("run-*")
    other = own.with_name("run-0123456789ab")
    shutil.copytree(own / "iter_0000007", other / "iter_0000008")
    said = runs.goes_on(runs.nodes[:1], 2, "--tensor-model-parallel-size", "2", "--micro-batch-size", "2")
    assert "resumed from local copies " in said and "at iteration 7" in said and "a lost node loses them" in said
    assert (other / "iter_0000008" / "manifest.json").is_file()


def test_a_flipped_bit_in_both_copies_leaves_the_shared_checkpoint(runs):
    runs.restore()
    for node in runs.nodes:
        (own,) = node.glob("run-*")
        with (own / "iter_0000007" / "pieces_00002.safetensors").open("r+b") as file:
            file.seek(-9, 2)
            byte = file.read(1)[0]
            file.seek(-9, 2)
            file.write(bytes([byte ^ 1]))
    said = runs.goes_on(runs.nodes, 2, *LAYOUT)
    assert "pieces_00002.safetensors" in said and "checkpoints/iter_0000005 at iteration 5" in said
    assert runs.sets(0) == ["iter_0000007"], "the new branch's, which replaced what was set aside"


def test_an_explicit_checkpoint_leaves_local_copies_aside(runs):
    runs.restore()
    shared = runs.place / "run" / "checkpoints" / "iter_0000005"
    said = runs.goes_on(runs.nodes, 2, *LAYOUT, "--checkpoint.load", str(shared))
    assert f"resumed from {shared} at iteration 5" in said
    assert said.count("iter_0000007.abandoned: the run goes on from iteration 5") == 2
    assert runs.sets(0) == runs.sets(1) == ["iter_0000007"]
