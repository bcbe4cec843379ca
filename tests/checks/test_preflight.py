"""Pre-flight of four processes of which one is on another machine: whatever differs is named with its rank."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_mm.checks import preflight
from megatron_mm.checks.preflight import Measured, Product
from megatron_mm.config.load import dump_config
from megatron_mm.config.section import changed
from megatron_mm.training import identity
from megatron_mm.training.identity import Place, differences, located
from tests.support.corpus import build_corpus, corpus_config
from tests.support.programs import PYTHON, TORCHRUN
from tests.support.recipes import small_config

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = [*TORCHRUN, "4"]
PLACES = [Place(rank, f"node{rank // 2}", rank % 2) for rank in range(8)]


def run(*words: object, **environment: str) -> subprocess.CompletedProcess:
    command = [str(word) for word in words]
    given = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False, cwd=ROOT, env=given)


# Judgement, without processes


def test_the_commonest_value_is_right_and_others_are_named():
    everyone = [{"code a.py": "1", "training.seed": "5"} for _ in range(8)]
    everyone[6] = {"code a.py": "2", "training.seed": "5"}
    everyone[7] = {"code a.py": "2"}
    assert differences(everyone, PLACES) == [
        "code a.py: 2 on ranks 6-7 (node3); 1 on 6 of 8",
        "training.seed: not there on rank 7 (node3, local rank 1); 5 on 7 of 8",
    ]
    assert not differences(everyone[:6], PLACES[:6])


def test_of_equally_common_values_the_first_ranks_is_right():
    assert differences([{"a": "1"}, {"a": "2"}], PLACES[:2]) == ["a: 2 on rank 1 (node0, local rank 1); 1 on 1 of 2"]


def test_ranks_are_named_with_their_hosts():
    assert located(PLACES[:1]) == "rank 0 (node0, local rank 0)"
    assert located([PLACES[0], *PLACES[4:7]]) == "ranks 0,4-6 (node0, node2, node3)"


def products(**changes) -> list[Product]:
    values = {"device": "A100", "seconds": 0.004, "tflops": 250.0, "digest": 7, "free": 79, "total": 80}
    return [Product(**{**values, **(changes if rank == 5 else {})}) for rank in range(8)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seconds": 0.0056, "tflops": 180.0}, "takes 1.40 times the median"),
        ({"tflops": 150.0}, "reaches 150 TFLOP/s of 312"),
        ({"digest": 8}, "computes another result"),
        ({"free": 60}, "another process holds the rest"),
        ({"device": "A30"}, "devices differ: A100 on ranks 0-4,6-7"),
    ],
)
def test_a_device_that_is_not_like_the_others_is_named(changes, message):
    _, problems = preflight._products(products(**changes), PLACES, 312.0, judged=True)
    assert [message in line and "rank 5 (node2, local rank 1)" in line for line in problems] == [True]


def test_healthy_devices_pass_and_speeds_of_a_cpu_are_not_judged():
    assert not preflight._products(products(), PLACES, 312.0, judged=True)[1]
    assert not preflight._products(products(seconds=0.0056), PLACES, None, judged=False)[1]


def test_a_group_is_as_slow_as_its_slowest_member_and_compared_with_its_kind():
    def measured(rank: int, seconds: float, right: bool = True) -> list[Measured]:
        host = rank // 2 * 2
        own = Measured("all-reduce, tensor parallel", (host, host + 1), 1e6, seconds, right)
        return [own, Measured("all-reduce, all processes", tuple(range(8)), 1e6, 0.1, True)]

    everyone = [measured(rank, 0.016 if rank == 5 else 0.010) for rank in range(8)]
    lines, problems = preflight._together(everyone, PLACES, judged=True)
    assert len(lines) == 2 and "4 groups of 2, median 0.1 GB/s" in lines[0] and "across hosts" in lines[1]
    assert len(problems) == 1 and "ranks 4-5 (node2) takes 1.60 times the median" in problems[0]
    assert not preflight._together(everyone, PLACES, judged=False)[1]
    everyone[3] = measured(3, 0.010, right=False)
    assert "rank 3 (node1, local rank 1) received a wrong result" in preflight._together(everyone, PLACES, False)[1][0]


def test_a_disk_without_room_for_the_checkpoints_is_refused(tmp_path, monkeypatch):
    config = changed(small_config(), {"logging.output": str(tmp_path), "checkpoint.keep_last": 3})
    assert not preflight._disk(config)[1]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 2**20))
    assert "4 checkpoints of" in preflight._disk(config)[1][0]
    for iteration in (1, 2, 3):
        (tmp_path / "checkpoints" / f"iter_{iteration:07d}").mkdir()
    assert "1 checkpoints of" in preflight._disk(config)[1][0]


def test_settings_of_a_node_may_differ_and_those_of_a_collective_may_not(monkeypatch):
    for name in ("NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_DEBUG", "NCCL_DEBUG_FILE", "NCCL_TOPO_FILE", "PATH"):
        monkeypatch.setenv(name, "1")
    names = ("NCCL_ALGO", "NVTE_FLASH_ATTN", "CUDA_DEVICE_MAX_CONNECTIONS", "TORCH_NCCL_BLOCKING_WAIT")
    names += ("PYTORCH_ALLOC_CONF", "NVIDIA_TF32_OVERRIDE")
    for name in names:
        monkeypatch.setenv(name, "1")
    found = {name.partition(" ")[2] for name in identity.facts(small_config()) if name.startswith("environment ")}
    assert found == set(names)


def test_a_dataset_that_cannot_be_listed_is_a_fact_too(tmp_path, monkeypatch):
    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", forbidden)
    assert identity._dataset(str(tmp_path), None) == {str(tmp_path): "Permission denied"}


def test_what_a_builders_file_raises_is_a_fact_too(tmp_path):
    """On one process perhaps alone: the comparison names it, where an error would leave the others waiting."""
    broken = tmp_path / "broken.py"
    broken.write_text("raise RuntimeError('no such node')")
    config = changed(small_config(), {"logging.output": str(tmp_path / "out"), "data.builder": f"{broken}:build"})
    assert identity.facts(config)["code plugins"] == "RuntimeError: no such node"
    config = changed(config, {"data.builder": f"{tmp_path}/gone.py:build"})
    assert "there is no file" in identity.facts(config)["code plugins"]


# Four processes


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build_corpus(tmp_path_factory.mktemp("corpus"))


def recipe(folder: Path) -> Path:
    config = changed(
        small_config(),
        {
            "logging.output": str(folder / "out"),
            "parallel.tensor_model_parallel_size": 2,
            "parallel.pipeline_model_parallel_size": 2,
        },
    )
    dump_config(config, folder / "recipe.yaml")
    return folder / "recipe.yaml"


@pytest.mark.slow
def test_what_one_rank_has_otherwise_is_named_before_training(corpus, tmp_path):
    """Rank 1 reads another recipe, rank 2 runs other code, rank 3 reads other data: each in a folder of its own."""
    config = corpus_config(Path("discs"), Path("t.model"), tmp_path / "out")
    for rank in range(4):
        here = tmp_path / str(rank)
        shutil.copytree(corpus[0].parent, here)
        config = changed(config, {"training.seed": 77 if rank == 1 else 5})
        dump_config(config, here / "recipe.yaml")
    shutil.copytree(ROOT / "megatron_mm", tmp_path / "code" / "megatron_mm")
    shutil.copy(ROOT / "pretrain_multimodal.py", tmp_path / "code")
    edited = tmp_path / "code" / "megatron_mm" / "training" / "loop.py"
    edited.write_text(edited.read_text().replace("The training run", "The Training run", 1))
    (tmp_path / "3" / "discs" / "text.idx").write_bytes(b"another shard")
    launch = (
        f'cd {tmp_path}/$RANK; code={ROOT} NCCL_ALGO=Tree; [ "$RANK" = 2 ] && code={tmp_path}/code NCCL_ALGO=Ring; '
        "export NCCL_ALGO; "  # by every rank: what differs are values alone
        f"exec {PYTHON} $code/pretrain_multimodal.py --config recipe.yaml"
    )
    done = run(*LAUNCHER, "--no-python", "bash", "-c", launch, PYTHONPATH="")
    assert done.returncode == 1 and done.stderr.count("error: ") == 1
    lines = done.stderr.splitlines()
    for name, value, rank in (
        ("training.seed", "77", 1),
        ("code megatron_mm/training/loop.py", "", 2),
        ("environment NCCL_ALGO", "Ring", 2),
        ("data discs/text.idx", "13 bytes", 3),
    ):
        (line,) = (line.strip() for line in lines if line.startswith(f"  {name}: "))
        assert line.startswith(f"{name}: {value}") and f"on rank {rank} (" in line and line.endswith("on 3 of 4")
    assert not (tmp_path / "out" / "metrics.jsonl").exists() and not list((tmp_path / "out").glob("**/.preflight*"))


@pytest.mark.slow
def test_a_check_that_passes_says_so_with_figures_and_trains_nothing(corpus, tmp_path):
    config = corpus_config(*corpus, tmp_path / "out")
    dump_config(config, tmp_path / "recipe.yaml")
    words = ["--check", "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    words += ["--checkpoint.local-folder", str(tmp_path / "local")]
    done = run(*LAUNCHER, "pretrain_multimodal.py", "--config", tmp_path / "recipe.yaml", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "all processes see this folder, so it is one node" in done.stdout
    assert "local copies: node 0 needs " in done.stdout and f" GiB for 2 sets in {tmp_path}/local/out-" in done.stdout
    assert done.stdout.rstrip().endswith("pre-flight passed")
    figures = json.loads((tmp_path / "out" / "preflight.json").read_text())
    assert figures["passed"] and len(figures["products"]) == 4
    kinds = {group["kind"].split(",")[1].strip(): len(group["places"]) for group in figures["groups"]}
    assert kinds == {"tensor parallel": 2, "all processes": 4, "pipeline": 2}
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_every_rank_with_a_fault_is_named(tmp_path):
    done = run(*LAUNCHER, "tests/checks/preflight_worker.py", recipe(tmp_path), "damaged")
    assert done.returncode == 1 and done.stderr.count("error: ") == 1 and "pre-flight passed" not in done.stdout
    host = os.uname().nodename
    problems = json.loads((tmp_path / "out" / "preflight.json").read_text())["problems"]
    for message in (
        f"matrix product: rank 1 ({host}, local rank 1) computes another result than the other a device",
        f"matrix product: rank 2 ({host}, local rank 2) takes 1.40 times the median (200 TFLOP/s)",
        f"memory: 0.0 of 0.0 GiB are free on rank 3 ({host}, local rank 3); another process holds the rest",
        f"all-reduce, tensor parallel: rank 3 ({host}, local rank 3) received a wrong result",
    ):
        assert message in problems and message in done.stderr
    assert not [line for line in problems if line.startswith("all-reduce") and "wrong" in line and "rank 3" not in line]
    assert f"rank 0's folder is not seen (it must be shared storage) on rank 2 ({host}, local rank 2)" in done.stdout


@pytest.mark.slow
def test_a_rank_that_hangs_ends_with_stacks(tmp_path):
    """Each waits for the stacks of all, and not for those of an earlier run."""
    (tmp_path / "out" / "stacks").mkdir(parents=True)
    for rank in range(4):
        (tmp_path / "out" / "stacks" / f"rank_{rank}.txt").write_text("of last week")
        os.utime(tmp_path / "out" / "stacks" / f"rank_{rank}.txt", (1, 1))
    done = run(*LAUNCHER, "tests/checks/preflight_worker.py", recipe(tmp_path), "hangs")
    assert done.returncode != 0
    stacks = {file.name: file.read_text() for file in (tmp_path / "out" / "stacks").iterdir()}
    assert sorted(stacks) == [f"rank_{rank}.txt" for rank in range(4)]
    assert "in product" in stacks["rank_2.txt"] and "barrier" not in stacks["rank_2.txt"]
    assert all("gather_object" in stacks[f"rank_{rank}.txt"] for rank in (0, 1, 3)), stacks


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_check(tmp_path):
    done = run(*LAUNCHER, "tests/checks/preflight_worker.py", recipe(tmp_path), "dies")
    assert done.returncode != 0 and "pre-flight passed" not in done.stdout


@pytest.mark.slow
def test_an_error_of_one_rank_alone_is_said_by_it(tmp_path):
    """Rank 1 alone cannot read its recipe: rank 0 has nothing to say, so it says so itself, with its place."""
    for rank in range(4):
        (tmp_path / str(rank)).mkdir()
        recipe(tmp_path / str(rank))
    (tmp_path / "1" / "recipe.yaml").unlink()
    launch = f"cd {tmp_path}/$RANK; exec {PYTHON} {ROOT}/pretrain_multimodal.py --config recipe.yaml"
    done = run(*LAUNCHER, "--no-python", "bash", "-c", launch)
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert "there is no recipe recipe.yaml" in line
    assert f"(on rank 1, {os.uname().nodename})" in done.stderr
