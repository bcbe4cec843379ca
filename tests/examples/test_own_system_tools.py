"""What the package's tools make of a system of one's own, whose code is wrong, absent or another on one process."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests.support.programs import PYTHON
from tests.support.waiting import HANG_SECONDS

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "own_system"
RECIPE, SOURCE = (EXAMPLE / name for name in ("byte-mixer.yaml", "byte_mixer.py"))
#: A loss that is another, and trains as well.
LOSS = "return torch.dot(losses, batch.loss_mask_RT.flatten())"
QUICK = ["--train-iters", "2", "--lr-warmup-iters", "0", "--training.eval-interval", "0"]


def call(*words: object, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder), "PYTHONWARNINGS": "ignore"}
    command = [PYTHON, *map(str, words)]
    return subprocess.run(
        command, cwd=folder, env=variables | environment, capture_output=True, encoding="utf-8", timeout=HANG_SECONDS
    )


def own_recipe(folder: Path, source: str, lines: str = "") -> Path:
    """The example's recipe beside another source of its."""
    (folder / "byte_mixer.py").write_text(source)
    text = RECIPE.read_text().replace("examples/own_system/byte_mixer.py:", "byte_mixer.py:")
    (folder / "r.yaml").write_text(text + lines)
    return folder / "r.yaml"


@pytest.mark.slow
def test_a_cost_that_counts_other_parameters_is_refused_with_its_node(tmp_path):
    wrong = SOURCE.read_text().replace("cost(matrix + 2 * width, ", "cost(7, ")
    assert wrong != SOURCE.read_text()
    done = call("pretrain_multimodal.py", "--config", own_recipe(tmp_path, wrong), "--dry-run", "--world-size", 1)
    assert done.returncode == 1
    assert "error: node 'layers.0': its cost says 7 parameters, its module has 92,352" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_trained_one_is_scored(tmp_path):
    run = tmp_path / "run"
    done = call("pretrain_multimodal.py", "--config", RECIPE, *QUICK, "--logging.output", run)
    assert done.returncode == 0, done.stderr[-2000:]
    named = ("--plugins", SOURCE)
    done = call("tools/score_objectives.py", "--checkpoint", run, "--limit", 16, "--untrained", *named)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = {line.split()[0]: [float(word) for word in line.split()[1:]] for line in done.stdout.splitlines()[1:]}
    trained, untrained = figures["next_byte/loss"]
    assert trained < untrained and set(figures) >= {"next_byte/accuracy", "next_byte/majority"}
    (tmp_path / "x.jsonl").write_text('{"text": "import os"}\n')
    done = call("tools/score_objectives.py", "--checkpoint", run, "--input", tmp_path / "x.jsonl", *named)
    assert done.returncode == 1 and "data.builder" in done.stderr and "leave --input out" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "lines",
    ["pipeline_model_parallel_size: 2", "tensor_model_parallel_size: 2, sequence_parallel: true"],
    ids=["pipeline", "tensor"],
)
def test_layouts_are_compared_with_one_process_whatever_the_recipes_is(tmp_path, lines):
    recipe = own_recipe(tmp_path, SOURCE.read_text(), f"parallel: {{{lines}}}\n")
    words = ("--config", recipe, "--layouts", "PP2", "--iterations", 1)
    done = call("tools/verify_layouts.py", *words)
    assert done.returncode == 0 and "1 of 1 layouts agree" in done.stdout, done.stdout + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("differs", ["the plugin", "what it imports"])
def test_processes_whose_plugins_differ_do_not_train(tmp_path, differs):
    """Named as a module, which each process finds in a folder of its own."""
    source = SOURCE.read_text()
    other = source.replace(LOSS, LOSS.replace("return ", "return 0.5 * "))
    assert other != source
    front = "from own_parts import *\nfrom own_parts import build_datasets\n"
    files = [{"own_mixer.py": text} for text in (source, other)]
    if differs == "what it imports":
        files = [{"own_mixer.py": front, "own_parts.py": text} for text in (source, other)]
    text = RECIPE.read_text().replace("[byte_mixer.py]", "[own_mixer]")
    (tmp_path / "r.yaml").write_text(text.replace("examples/own_system/byte_mixer.py:", "own_mixer:"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank, own in enumerate(files):
        place = tmp_path / f"node{rank}"
        place.mkdir()
        for name, lines in own.items():
            (place / name).write_text(lines)
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        variables |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONWARNINGS": "ignore"}
        variables["PYTHONPATH"] = os.pathsep.join((str(place), str(ROOT)))
        command = [PYTHON, "pretrain_multimodal.py", "--config", str(tmp_path / "r.yaml"), *QUICK]
        command += ["--logging.output", str(tmp_path / "out"), "--logging.no-tensorboard"]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=variables, **output))
    said = "".join(process.communicate(timeout=HANG_SECONDS)[0] for process in processes)
    assert all(process.returncode for process in processes)
    assert "must have the same" in said and ("own_parts" if differs == "what it imports" else "own_mixer") in said


@pytest.mark.parametrize("words", [["pretrain_multimodal.py", "--help"], ["tools/count_parameters.py", "--help"]])
def test_programs_run_their_own_checkout(tmp_path, words):
    """Even where the environment has another one installed in place."""
    for name in ("megatron_mm", "tools", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pretrain_multimodal.py", tmp_path)
    with (tmp_path / "megatron_mm" / "config" / "schema.py").open("a") as stream:
        stream.write('raise SystemExit("this is the second checkout")\n')
    done = call(*words, folder=tmp_path, PYTHONPATH=str(ROOT))
    assert "this is the second checkout" in done.stderr
