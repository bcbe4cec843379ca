"""The checks for owners of GPUs, in the form that a CPU can run: they pass where nothing is wrong, and can fail."""

import itertools
import json
import re
import socket
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_mm.checks import gpu_checks
from megatron_mm.checks.gpu_checks import GRADIENT_NORM, LOSS, MEMORY, MFU, Machines, Verdict, same_curve
from megatron_mm.config.section import changed
from megatron_mm.config.validate import check, parallel_sizes
from megatron_mm.platform import setup
from tests.support.programs import PYTHON
from tests.support.waiting import free_ports

ROOT = Path(__file__).resolve().parents[2]


def curve(*losses: float) -> list[dict]:
    return [{"iteration": i + 1, "loss": loss, "grad_norm": 1.0} for i, loss in enumerate(losses)]


def test_bounds_of_a_curve():
    first = curve(2.0, 1.5, 1.0)
    assert all(verdict.passed for verdict in same_curve("c", "fp32", first, curve(2.0, 1.5 * (1 + 9e-5), 1.0)))
    worse = [verdict.passed for verdict in same_curve("c", "fp32", first, curve(2.0, 1.5 * (1 + 2e-4), 1.0))]
    assert worse == [False, True, True]
    assert not next(same_curve("c", "bf16", first, curve(2.0, 1.5, float("nan")))).passed
    norms = [{**line, "grad_norm": 1.1} for line in first]
    assert [verdict.passed for verdict in same_curve("c", "fp32", first, norms)] == [True, False, True]


def test_bounds_are_those_that_the_readme_promises():
    found = re.search(
        r"loss within (\S+) in fp32 and (\S+) in BF16, gradient norm within (\S+) and (\S+)\), .* MFU "
        r"\(at least (\d+)%\) and memory \((\S+) to (\S+) of the dry run's\)",
        " ".join((ROOT / "README.md").read_text().split()),
    )
    bounds = [*LOSS.values(), *GRADIENT_NORM.values(), 100 * MFU, *MEMORY]
    assert [float(number) for number in found.groups()] == pytest.approx(bounds)


def test_a_model_that_learns_nothing_is_no_evidence():
    still = curve(2.0, 2.0, 2.0)
    assert [verdict.passed for verdict in same_curve("c", "fp32", still, still)] == [True, True, False]


@pytest.mark.parametrize(("layout", "world_size"), [("TP1", 1), ("TP2xPP2+SP+distopt", 8), ("TP2+distopt", 16)])
def test_the_large_recipe_fits_its_layouts_and_a_gpu(layout, world_size):
    setup.apply_platform()
    from megatron_mm.config.sizes import ParallelSizes
    from megatron_mm.models.phases import LAST_PHASE
    from megatron_mm.planner.assembly import Assembly
    from megatron_mm.planner.costs import total_parameters
    from tests.support.full_recipes import estimates

    config = gpu_checks.in_layout(gpu_checks.large(20, "transformer_engine"), layout, world_size)
    sizes = parallel_sizes(config, world_size)
    check(config, sizes)
    assert config.parallel.sequence_parallel == ("SP" in layout)
    assembly = Assembly.of(config, ParallelSizes(), iteration=LAST_PHASE)
    assert total_parameters(assembly.graph, assembly.plan) == pytest.approx(1.1e9, rel=0.05)
    assert max(estimates(config, sizes)) < 36 * 2**30


class Recorded(Machines):
    """A GPU's figures in place of runs."""

    def pretrain(self, name, config, *words, processes=None, fresh=True):
        (self.output / name / "checkpoints").mkdir(parents=True)
        return [
            {"iteration": i, "loss": 1.0, "iteration_time": 9.0 if i < 4 else 1.0, "mfu": 0.01 if i < 4 else self.mfu,
             "max_memory_gib": self.gib}
            for i in range(20)
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("mfu", "gib", "passed"),
    [
        (MFU + 0.01, 15.1, [True, True]),
        (MFU - 0.01, 14.9, [False, False]),
        (0.3, 24.9, [True, True]),
        (0.3, 25.1, [True, False]),
    ],
)
def test_speed_and_memory_are_judged_where_they_are_measured(mfu, gib, passed, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_checks, "planned_memory", lambda *_: 20.0)
    machines = Recorded(tmp_path, cuda=True, gpus=1)
    machines.mfu, machines.gib = mfu, gib
    verdicts = list(gpu_checks.speed_and_memory(machines, "TP1", 1, 20))
    assert [verdict.passed for verdict in verdicts] == passed
    assert not (tmp_path / "large" / "checkpoints").exists()


@pytest.mark.parametrize(("second", "passed"), [([], True), (["--training.seed=2"], False)])
def test_layouts_take_the_options_of_second_runs(second, passed, tmp_path, monkeypatch):
    def launch(config, layout, environment):
        return {"losses": [float(config.training.seed)], "norms": [1.0], "gradients": {"0/a": torch.ones(1)}}

    monkeypatch.setattr(gpu_checks, "launch", launch)
    machines = Machines(tmp_path, cuda=False, gpus=4, second=second)
    verdicts = list(gpu_checks.layouts(machines, ["TP2", "DP2"], 4, "local", gpu_checks.SYNAPSE))
    assert [verdict.passed for verdict in verdicts] == [passed] * 2


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        ("node", ["--tensor-model-parallel-size=2"], "parallel.tensor_model_parallel_size is what `node` sets itself"),
        ("node", ["--parallel.tensor-model-parallel-size=1", "--lr=4e-3"], "parallel.tensor_model_parallel_size is"),
        ("node", ["--train-iters=3", "--model.hidden-dropout=0.1"],
         "model.hidden_dropout, training.train_iters are what `node` sets itself"),
        ("two-nodes", ["--pipeline-model-parallel-size=1"], "parallel.pipeline_model_parallel_size is what `two"),
        ("two-nodes", ["--recompute-granularity=full"], "parallel.recompute_granularity is what `two-nodes` sets"),
        ("one", ["--pipeline-model-parallel-size=2"], "`one`: 1 processes do not divide by tensor 1 x pipeline 2"),
        ("one", ["--training.seed=1234"], "the second run would be the first again"),
        ("one", ["--dry-run"], "--dry-run is no setting of a run"),
    ],
)  # fmt: skip
def test_options_of_second_runs_that_no_comparison_would_see_are_refused(what, options, message):
    """Options of a layout above all: the layouts that are compared are the checks' own."""
    with pytest.raises(ValueError, match=re.escape(message)):
        gpu_checks.check_second(what, options, 4)


def test_options_of_second_runs_that_are_acted_upon_are_taken():
    for what in ("one", "node", "two-nodes"):
        gpu_checks.check_second(what, [], 4)
        gpu_checks.check_second(what, ["--lr=4e-3", "--training.seed=2"], 4)
    gpu_checks.check_second("one", ["--recompute-granularity=full"], 4)  # one process can


def test_a_run_that_fails_is_a_check_that_fails_and_the_others_go_on():
    def broken():
        raise ValueError("no such module transformer_engine")
        yield

    (verdict,) = gpu_checks.attempted("backends", broken)
    assert str(verdict) == "FAIL  backends: no such module transformer_engine"
    assert str(Verdict("MFU", None, "not measured")) == "----  MFU: not measured"


def tool(*words: object) -> list[str]:
    return [PYTHON, "tools/check_gpus.py", *map(str, words)]


def run(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run(tool(*words), capture_output=True, encoding="utf-8", check=False, cwd=ROOT)


@pytest.mark.slow
def test_one_runs_here_and_can_fail(tmp_path):
    """The second runs learn at another rate: the very comparisons fail that must, and nothing else."""
    done = run("one", "--steps", 6, "--output", tmp_path, "--json", tmp_path / "found.json", "--second", "lr=4e-3")
    assert done.returncode == 1, done.stdout + done.stderr
    found = {line["check"]: line["passed"] for line in json.loads((tmp_path / "found.json").read_text())}
    assert found == {
        "pre-flight": True,
        "local against local, fp32, dual-encoder-tiny, loss": False,
        "local against local, fp32, dual-encoder-tiny, grad_norm": False,
        "local against local, fp32, dual-encoder-tiny, the model learns": True,
        "local against local, bf16, synapse-tiny, loss": False,
        "local against local, bf16, synapse-tiny, grad_norm": False,
        "local against local, bf16, synapse-tiny, the model learns": True,
        "MFU, TP1 on 1": None,
        "memory of rank 0, TP1 on 1": None,
    }
    assert "no CUDA" in done.stdout and "not measured: no CUDA; the dry run says" in done.stdout
    assert done.stdout.splitlines()[-1] == "FAILED: 4 of 9 checks failed, 2 not measured"


@pytest.mark.slow
def test_a_node_runs_here(tmp_path):
    done = run("node", "--steps", 4, "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(" ")[0] for line in lines[1:-1]] == ["PASS"] * 4 + ["----"] * 2
    assert lines[-1] == "passed: 0 of 6 checks failed, 2 not measured"


@pytest.mark.slow
def test_two_nodes_run_here_as_two_programs(tmp_path):
    """Two launchers of a process each on this machine: pipeline stages and data parallel between them."""
    port = free_ports(11)  # of the first node, and ten for runs
    words = ["two-nodes", "--steps", 4, "--gpus", 1, "--output", tmp_path, "--master-port", port]
    with socket.create_server(("", port + 2)):  # something else has it: another of the ten is used
        second = subprocess.Popen(tool(*words, "--node-rank", 1), cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8")
        done = run(*words, "--node-rank", 0)
    assert done.returncode == 0, done.stdout + done.stderr
    assert second.wait() == 0 and second.stdout.read() == ""
    assert "PASS  TP1xPP2+distopt saved in the middle, resumed as TP1+distopt, loss: " in done.stdout
    metrics = (tmp_path / "resumed" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in metrics] == [1, 2, 3, 4]
    assert "resumed from" in (tmp_path / "resumed-0.log").read_text()


def test_a_users_folder_is_not_that_of_checks(tmp_path):
    """Runs of the names of checks are removed, so that their folder must be theirs; earlier ones left no marker."""
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "notes.txt").write_text("mine")
    (tmp_path / "large-0.yaml").write_text("logging: {output: outputs/large}\n")  # a recipe of the user's
    with pytest.raises(ValueError, match=r"--output .* holds large and no \.megatron_mm-output of tools/check_gpus.py"):
        Machines(tmp_path, cuda=False, gpus=1)
    config = gpu_checks.prepared(gpu_checks.SYNAPSE, 4, "fp32", "local")
    config = changed(config, {"logging.output": str(tmp_path / "large")})
    gpu_checks.dump_config(config, tmp_path / "large-0.yaml")
    for _ in range(2):
        Machines(tmp_path, cuda=False, gpus=1)
    assert (tmp_path / "large" / "notes.txt").exists(), "only a run of that name removes it"


@pytest.mark.parametrize("output", ["", "/"])
def test_an_empty_path_is_refused(output):
    done = run("one", "--output", output)
    assert done.returncode == 2 and "error: --output" in done.stderr


def test_ports_of_two_nodes(tmp_path):
    """The first node chooses a free one for each run, another than the last, and the second is told."""
    base = free_ports(11)
    first = Machines(tmp_path, cuda=False, gpus=1, nodes=2, port=base)
    second = Machines(tmp_path, cuda=False, gpus=1, nodes=2, node_rank=1, port=base)
    with socket.create_server(("", base + 3)):
        chosen = [first._agreed_port() for _ in range(12)]
    assert chosen == [second._agreed_port() for _ in range(12)]
    assert set(chosen) <= set(range(base + 1, base + 11)) - {base + 3}
    assert all(one != other for one, other in itertools.pairwise(chosen))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_checks, "_is_free", lambda port: False)
        with pytest.raises(ValueError, match=f"ports {base + 1} to {base + 10} of localhost are taken"):
            first._agreed_port()
    with pytest.raises(ValueError, match=f"ports {base + 1} to {base + 10} of localhost are taken"):
        second._agreed_port()


def test_a_run_that_fails_is_quoted(tmp_path):
    log = tmp_path / "run.log"
    log.write_text("begun\nerror: no data\n  in a.bin\nTraceback\n  File x\nend\n")
    assert gpu_checks._reason(log) == "error: no data in a.bin Traceback File x"
    log.write_text("Traceback\n  File x\n    main()\nDistNetworkError: EADDRINUSE\n")
    assert gpu_checks._reason(log) == "File x main() DistNetworkError: EADDRINUSE"
    log.write_text("Killed\n")
    assert gpu_checks._reason(log) == "Killed"


@pytest.mark.slow
def test_usage_is_refused_by_name():
    done = run("node", "--gpus", 2)
    assert done.returncode == 2 and "error: --gpus is 2; `node` needs at least 4" in done.stderr
    assert run("one", "--steps", 3).returncode == 2
    done = run("one", "--gpus", 2)
    assert done.returncode == 2 and "error: --gpus is 2; `one` checks a single GPU" in done.stderr
    done = run("node", "--nodes", 3)
    assert done.returncode == 2 and "error: --nodes is 3; `node` checks one node" in done.stderr
    done = run("two-nodes", "--second", "context-parallel-size=2")
    assert done.returncode == 2 and "error: --second: parallel.context_parallel_size is what `two-nodes`" in done.stderr
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("two-nodes", "--master-port", port)
    assert done.returncode == 2 and f"error: port {port} of this node is taken: set --master-port" in done.stderr
