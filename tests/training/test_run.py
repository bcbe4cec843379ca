"""Whole runs of pretrain_multimodal.py on a small real corpus: killed, stopped, damaged, and resumed elsewhere.

Truth is the uninterrupted run: its loss curve and its sample ids.
"""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from megatron_mm.checkpoints import folder as checkpoint_folder
from megatron_mm.config.load import dump_config, load_config
from megatron_mm.config.schema import DatasetConfig
from megatron_mm.config.section import changed
from megatron_mm.data.build.text import build_text
from tests.support.corpus import build_corpus, corpus_config
from tests.support.programs import INTERPRETER, PYTHON, TORCHRUN
from tests.support.recipes import small_config
from tests.support.waiting import HANG_SECONDS, wait_until

pytestmark = pytest.mark.slow
STEPS = 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build_corpus(tmp_path_factory.mktemp("corpus"))


def recipe(corpus, output: Path, **training) -> Path:
    """Writes a recipe for a run into `output` and returns its path."""
    config = changed(
        corpus_config(*corpus, output),
        {
            "training.train_iters": STEPS,
            "checkpoint.save_interval": 4,
            "checkpoint.keep_last": 0,
            "optimizer.lr_decay_iters": STEPS,
            **{f"training.{key}": value for key, value in training.items()},
        },
    )
    output.mkdir(parents=True, exist_ok=True)
    path = output / "recipe.yaml"
    dump_config(config, path)
    return path


def command(path: Path, processes: int, *words: str) -> list[str]:
    launcher = [*TORCHRUN, str(processes)]
    launcher = launcher if processes > 1 else [PYTHON]
    return [*launcher, "pretrain_multimodal.py", "--config", str(path), *words]


def held(words: list[str], step: int, **options) -> subprocess.Popen:
    """Starts a run that waits for a signal after a step, and takes as long as it needs to save then."""
    environment = {"HELD_AFTER": str(step), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(HANG_SECONDS))}
    words = [*words, "--data.builder", "tests/training/held_data.py:build"]
    return subprocess.Popen(words, env={**os.environ, **environment}, encoding="utf-8", **options)


def run(path: Path, processes: int = 1, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(path, processes, *words), capture_output=True, encoding="utf-8", check=False)


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted")
    done = run(recipe(corpus, output))
    assert done.returncode == 0, done.stderr[-2000:]
    return output


def assert_same_history(output: Path, uninterrupted: Path) -> None:
    ours, theirs = metrics(output), metrics(uninterrupted)
    assert [line["iteration"] for line in ours] == list(range(1, STEPS + 1))
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), a["iteration"]
        assert a["sample_ids"] == b["sample_ids"] and a["consumed_samples"] == b["consumed_samples"]
        assert a["learning_rate"] == pytest.approx(b["learning_rate"], rel=1e-12)


@pytest.mark.interface
def test_loss_falls_and_every_figure_is_there(uninterrupted):
    lines = metrics(uninterrupted)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    wanted = {"iteration", "consumed_samples", "loss", "grad_norm", "learning_rate", "tokens_per_second"}
    assert wanted | {"iteration_time", "sample_ids"} <= lines[0].keys()


@pytest.mark.interface
def test_killed_and_resumed_in_another_layout(corpus, uninterrupted, tmp_path):
    """kill -9 between two checkpoints; then TP2 x DP2 with the distributed optimizer instead of PP2."""
    path, lines = recipe(corpus, tmp_path), tmp_path / "metrics.jsonl"
    words = command(path, 2, "--pipeline-model-parallel-size", "2", "--save-interval", "3", "--no-async-save")
    words[0] = INTERPRETER  # nothing between the signal and the processes
    process = held(words, 5, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: lines.exists() and lines.read_text().count("\n") == 5, "the fifth step", process)
    # torchrun's agent and its processes, which have sessions of their own and would outlive it.
    started = psutil.Process(process.pid).children(recursive=True)
    for each in (process, *started):
        each.kill()
    process.wait()
    psutil.wait_procs(started)
    words = ["--tensor-model-parallel-size", "2", "--use-distributed-optimizer", "--micro-batch-size", "1"]
    done = run(path, 4, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "iter_0000003 at iteration 3" in done.stdout
    assert "\nattention: torch's scaled_dot_product_attention\n" in done.stdout
    assert_same_history(tmp_path, uninterrupted)


def test_a_blend_resumed_five_times_elsewhere_reads_the_same_samples(corpus, tmp_path):
    """Other data-parallel sizes, layouts, microbatches and reader workers at each stop; ids in order, losses too."""
    output, tokenizer = tmp_path / "blend", str(corpus[1])
    lines = [json.dumps({"text": f"line {number}: {'word ' * (number % 23)}"}) for number in range(200)]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    build_text([str(tmp_path / "lines.jsonl")], str(tmp_path / "lines"), tokenizer, workers=0, progress=False)
    for folder in ("whole", "blend"):
        path = recipe(corpus, tmp_path / folder)
        config = load_config(path)
        config.data.datasets.append(DatasetConfig(path=str(tmp_path / "lines_text_document"), weight=0.7))
        dump_config(config, path)
    whole = run(tmp_path / "whole" / "recipe.yaml")
    assert whole.returncode == 0, whole.stderr[-2000:]
    stops = {
        2: (2, "--micro-batch-size 1 --num-workers 2"),
        4: (4, "--micro-batch-size 1 --num-workers 1 --use-distributed-optimizer"),
        6: (2, "--pipeline-model-parallel-size 2 --num-workers 0"),
        8: (4, "--tensor-model-parallel-size 2 --micro-batch-size 1 --num-workers 2"),
        10: (1, "--num-workers 1"),
        12: (2, "--micro-batch-size 2 --num-workers 0"),
    }
    for stop, (processes, words) in stops.items():
        done = run(output / "recipe.yaml", processes, "--train-iters", str(stop), *words.split())
        assert done.returncode == 0, done.stderr[-2000:]
    assert_same_history(output, tmp_path / "whole")
    read = [name for line in metrics(output) for name in line["sample_ids"]]
    assert {name.split("/")[0] for name in read} == {corpus[0].name, "lines_text_document"}


def test_from_the_distributed_optimizer_to_one_process_with_a_damaged_checkpoint(corpus, uninterrupted, tmp_path):
    path = recipe(corpus, tmp_path)
    first = run(path, 2, "--use-distributed-optimizer", "--micro-batch-size", "1", "--train-iters", "8")
    assert first.returncode == 0, first.stderr[-2000:]
    newest = tmp_path / "checkpoints" / "iter_0000008"
    shard = max(newest.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    second = run(path)
    assert second.returncode == 0, second.stderr[-2000:]
    assert "a damaged checkpoint is passed over" in second.stderr and shard.name in second.stderr
    assert "resumed from" in second.stdout and "iter_0000004" in second.stdout
    assert_same_history(tmp_path, uninterrupted)


def test_bf16_trains_and_resumes_in_another_layout(corpus, tmp_path):
    """Master weights and moments are fp32 and travel between layouts; bf16 rounding bounds the agreement.

    Truth is the same bf16 run left in its layout: bf16 keeps 8 bits, and sums in another order agree to 2%.
    """
    words = ["--training.precision", "bf16", "--pipeline-model-parallel-size", "2"]
    first = run(recipe(corpus, tmp_path / "a"), 2, *words, "--train-iters", "8")
    assert first.returncode == 0, first.stderr[-2000:]
    shutil.copytree(tmp_path / "a" / "checkpoints", tmp_path / "b" / "checkpoints")
    words = ["--training.precision", "bf16", "--tensor-model-parallel-size", "2", "--use-distributed-optimizer"]
    assert run(recipe(corpus, tmp_path / "a"), 2, "--pipeline-model-parallel-size", "2", *words[:2]).returncode == 0
    second = run(recipe(corpus, tmp_path / "b"), 4, *words, "--micro-batch-size", "1")
    assert second.returncode == 0, second.stderr[-2000:]
    ours, theirs = metrics(tmp_path / "b"), metrics(tmp_path / "a")
    assert [line["iteration"] for line in ours] == [9, 10, 11, 12]
    for a, b in zip(ours, theirs[8:], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2) and a["sample_ids"] == b["sample_ids"]


def test_sigterm_saves_and_the_run_goes_on(corpus, uninterrupted, tmp_path):
    path = recipe(corpus, tmp_path)
    process = held(command(path, 1, "--save-interval", "0"), 2, stdout=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith("iteration 2/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait() == 0 and "stopped by a signal at iteration 3" in rest
    assert run(path).returncode == 0
    assert_same_history(tmp_path, uninterrupted)


def test_sigterm_to_the_launcher_saves_in_every_process(corpus, uninterrupted, tmp_path):
    """Schedulers signal torchrun, which passes it on; a signal to its group reaches the processes twice."""
    path = recipe(corpus, tmp_path)
    words = ["--pipeline-model-parallel-size", "2", "--save-interval", "0"]
    process = held(command(path, 2, *words), 2, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    for line in process.stdout:
        if line.startswith("iteration 2/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    process.wait()
    assert "stopped by a signal at iteration 3" in rest and "saved" in rest
    folder, problems = checkpoint_folder.newest_whole(tmp_path / "checkpoints")
    assert folder is not None and not problems
    done = run(path)
    assert done.returncode == 0 and f"resumed from {folder}" in done.stdout
    assert_same_history(tmp_path, uninterrupted)


def test_a_run_whose_saves_are_slow_says_what_to_raise(corpus, tmp_path):
    """The manifest of a checkpoint records how long it took to write."""
    path = recipe(corpus, tmp_path)
    assert run(path, 1, "--train-iters", "1").returncode == 0
    folder, _ = checkpoint_folder.newest_whole(tmp_path / "checkpoints")
    manifest = folder / checkpoint_folder.MANIFEST
    slow = checkpoint_folder._sealed({**checkpoint_folder.recorded(folder), "seconds": 31.0})
    manifest.write_text(json.dumps(slow))
    said = run(path, 1, "--train-iters", "2").stdout
    assert said.count("warning: a save took 31 s") == 1 and "--shutdown-timeout 62" in said


def test_a_loss_that_is_not_finite_stops_before_the_update(corpus, tmp_path):
    """A weight of a checkpoint is NaN: the run names rank, stage and samples, and saves nothing on top."""
    path = recipe(corpus, tmp_path)
    done = run(path, 2, "--pipeline-model-parallel-size", "2", "--optimizer.lr", "1e30", "--clip-grad", "0")
    assert done.returncode == 1
    message = next(line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert "first seen on rank" in message and "pipeline stage" in message and "discs/s" in message
    assert done.stderr.count("error: iteration") == 1
    assert all(line["loss"] < 1e9 for line in metrics(tmp_path))


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(corpus, uninterrupted, tmp_path):
    """A limit on file size makes writing fail as a full disk does; the checkpoint before stays whole."""
    path = recipe(corpus, tmp_path)
    assert run(path, 1, "--train-iters", "4").returncode == 0
    limited = ["bash", "-c", 'ulimit -f 64; exec "$@"', "limited", *command(path, 1, "--train-iters", "9")]
    done = subprocess.run(limited, capture_output=True, encoding="utf-8", check=False)
    assert "warning: checkpoint" in done.stdout and "earlier checkpoints are whole" in done.stdout  # at iteration 8
    assert done.returncode == 1 and "error: checkpoint" in done.stderr  # the last one: nothing will try again
    assert "Traceback" not in done.stderr
    folder, problems = checkpoint_folder.newest_whole(tmp_path / "checkpoints")
    assert folder.name == "iter_0000004" and not problems
    assert run(path).returncode == 0
    assert_same_history(tmp_path, uninterrupted)


def test_a_hung_run_leaves_the_stacks_of_every_rank(tmp_path):
    """One process waits for ever for its data, the other for it: each watchdog writes its stacks and ends the run."""
    path = tmp_path / "recipe.yaml"
    config = small_config()
    config = changed(config, {"data.builder": "tests/training/stuck_data.py:build", "logging.output": str(tmp_path)})
    dump_config(config, path)
    done = run(path, 2, "--micro-batch-size", "1")
    assert done.returncode != 0
    stacks = {file.name: file.read_text() for file in (tmp_path / "stacks").iterdir()}
    assert sorted(stacks) == ["rank_0.txt", "rank_1.txt"]
    assert all("made no progress for 10 s in iteration 3" in text for text in stacks.values())
    assert "run_batch" in stacks["rank_0.txt"] and "stuck_data.py" in stacks["rank_1.txt"]
    assert "error: rank 0 made no progress" in done.stderr and "error: rank 1 made no progress" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tensor-model-parallel-size", "2"], "1 processes do not divide by tensor 2"),
        (["--model.decoder.vocab-size", "200"], "the model's vocab_size is 200; the"),
        (["--model.decoder.vocab-size", "2048"], "the model's vocab_size is 2048; the"),
        (["--data.tokenizer", "nowhere.model"], "nowhere.model"),
        (["--checkpoint.load", "nowhere"], "nowhere holds no whole checkpoint"),
        (["--model.audio.seconds", "0.25"], "model.audio.seconds is 0.25, 25 frames"),
    ],
)
def test_usage_that_cannot_work_is_refused(corpus, tmp_path, words, message):
    done = run(recipe(corpus, tmp_path), 1, *words)
    assert done.returncode in (1, 2) and message in done.stderr and "Traceback" not in done.stderr


def test_if_no_checkpoint_is_whole_nothing_is_overwritten(corpus, uninterrupted, tmp_path):
    path = recipe(corpus, tmp_path)
    shutil.copytree(uninterrupted / "checkpoints" / "iter_0000004", tmp_path / "checkpoints" / "iter_0000004")
    shutil.copy(uninterrupted / "metrics.jsonl", tmp_path)
    (tmp_path / "checkpoints" / "iter_0000004" / "pieces_00000.json").write_bytes(b"")
    done = run(path)
    assert done.returncode == 1 and "no checkpoint is whole" in done.stderr and "pieces_00000.json" in done.stderr
    assert len(metrics(tmp_path)) == STEPS


def test_an_error_on_one_rank_is_printed_once(corpus, tmp_path):
    """A damaged image that only the first stage reads: one line, no traceback of the ranks that wait for it."""
    dataset = tmp_path / "damaged"
    shutil.copytree(corpus[0], dataset)
    images = dataset / "images.bin"
    images.write_bytes(bytes(images.stat().st_size))
    words = ["--data-path", str(dataset), "--pipeline-model-parallel-size", "2"]
    done = run(recipe(corpus, tmp_path), 2, *words)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len([line for line in lines if line.startswith("error:")]) == 1 and "images" in done.stderr
    assert not any("pretrain_multimodal.py" in line and "File" in line for line in lines)


def test_a_checkpoint_of_another_model_is_refused(corpus, uninterrupted, tmp_path):
    path = recipe(corpus, tmp_path)
    shutil.copytree(uninterrupted / "checkpoints", tmp_path / "checkpoints")
    done = run(path, 2, "--pipeline-model-parallel-size", "2", "--model.decoder.ffn-hidden-size", "128")
    line = "  decoder.layers.0-3.mlp.linear_fc1.weight is (192, 64) where this model needs (256, 64); 1 more"
    assert done.returncode == 1 and line in done.stderr, "layers of both stages are one line"
