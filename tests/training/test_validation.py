"""Measures are logged where validation losses are, and are the same in every layout.

Truth is the run of one process, and its figures are those that tools/score_objectives.py makes of its checkpoint.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_mm.config.load import dump_config
from megatron_mm.config.schema import Config
from megatron_mm.config.section import changed
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.data.reading.generated import GeneratedRows
from megatron_mm.data.reading.microbatch import Microbatch
from megatron_mm.evaluation.objectives import score_objectives
from megatron_mm.evaluation.streams import GraphReader, validation_rows
from megatron_mm.objectives.measures import Retrieval, TokenAccuracy
from megatron_mm.pipeline.schedule import Pipeline
from megatron_mm.planner.assembly import Assembly
from megatron_mm.platform import setup
from megatron_mm.training.validation import Validation
from tests.support.programs import PYTHON, TORCHRUN
from tests.support.recipes import small_perceiver_fusion, small_sensor

ROOT = Path(__file__).parents[2]


def own_run(folder: Path, processes: int, **parallel: int) -> tuple[list[dict], str]:
    """Metrics and console of a short run of the sensor's system."""
    config = changed(
        small_sensor(),
        {
            "training.train_iters": 4,
            "training.eval_interval": 2,
            "training.eval_iters": 2,
            "training.micro_batch_size": 2,
            "training.global_batch_size": 8,
            "optimizer.lr": 2e-2,  # so that accuracy is soon that of a model that learns
            "optimizer.min_lr": 2e-2,
            "logging.output": str(folder),
            "checkpoint.save_interval": 0,
            **{f"parallel.{name}_parallel_size": size for name, size in parallel.items()},
        },
    )
    folder.mkdir()
    dump_config(config, folder / "recipe.yaml")
    launcher = [*TORCHRUN, str(processes)] if processes > 1 else [PYTHON]
    words = [*launcher, "pretrain_multimodal.py", "--config", str(folder / "recipe.yaml")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()], done.stdout


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    return folder, *own_run(folder, 1)


def measured(line: dict) -> dict[str, float]:
    return {key: value for key, value in line.items() if key.startswith("validation_causal_lm_")}


@pytest.mark.slow
def test_a_measure_stands_beside_the_validation_loss(one):
    _, lines, console = one
    assert [bool(measured(line)) for line in lines] == [False, True, False, True]
    assert measured(lines[-1]).keys() == {f"validation_causal_lm_{name}" for name in ("accuracy", "majority", "tokens")}
    assert lines[-1]["validation_causal_lm_tokens"] == 2 * 8 * 3 * 7, "two batches of eight rows of three documents"
    assert 0.1 < lines[-1]["validation_causal_lm_accuracy"] <= 1 and "validation_loss" in lines[-1]
    assert f"validation of causal_lm accuracy {lines[-1]['validation_causal_lm_accuracy']:.4g}, majority" in console


@pytest.mark.slow
def test_it_is_what_the_checkpoint_scores(one):
    folder, lines, _ = one
    reader = GraphReader.from_path(folder)
    figures = score_objectives(reader, reader.config, batch_size=4, rows=validation_rows)
    assert figures["causal_lm/accuracy"] == pytest.approx(lines[-1]["validation_causal_lm_accuracy"])
    assert figures["causal_lm/loss"] == pytest.approx(lines[-1]["validation_loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel",
    [{"pipeline_model": 2}, {"tensor_model": 2, "context": 2}],
    ids=["PP2xDP2", "TP2xCP2"],
)
def test_every_layout_logs_the_same(one, parallel, tmp_path):
    lines, console = own_run(tmp_path / "run", 4, **parallel)
    for ours, theirs in zip(lines, one[1], strict=True):
        # Of 336 tokens, one may be found or not by the order in which layouts add.
        assert measured(ours) == pytest.approx(measured(theirs), abs=1.01 / 336)
        wanted = {key: value for key, value in theirs.items() if key in ("loss", "validation_loss")}
        assert {key: ours[key] for key in wanted} == pytest.approx(wanted, rel=1e-5)
    assert console.count("validation of causal_lm") == 2, "by the first process alone"


def several_objectives() -> tuple[Config, Pipeline, list[Microbatch]]:
    """A system of several objectives, in evaluation, and two microbatches for it."""
    config = small_perceiver_fusion()
    device = setup.initialize(ParallelSizes(), 1)
    pipeline = Assembly.of(config, ParallelSizes()).build(device, config.training.seed)
    for chunk in pipeline.chunks:
        chunk.eval()
    rows = GeneratedRows(config)
    return config, pipeline, [rows.microbatch(range(at, at + 4)) for at in (0, 4)]


def test_a_system_of_several_objectives_is_measured_by_each():
    """The measures of validation are those of scoring, also where a loss spoils the stream that it reads."""
    config, pipeline, batches = several_objectives()
    validation = Validation(pipeline)
    assert validation.fields >= {"tokens_RT", "masked_labels_RT"}
    validation.add(batches)
    found = validation.figures()
    expected = score_objectives(GraphReader(config), config, rows=lambda *_: iter(batches))
    for name, value in expected.items():
        loss, _, figure = name.partition("/")
        key = f"validation_{loss}" if figure == "loss" else f"validation_{loss}_{figure}"
        assert found[key] == pytest.approx(value, rel=1e-5), name
    assert len(found) == len(expected) + 2, "the sum of the losses, and the contrastive one"
    assert validation.console_line().count(";") == 2 and Validation(pipeline).console_line() == ""


def test_counts_of_two_processes_are_those_of_one():
    """Of every measure of the system: recall, accuracy of masked tokens, accuracy of pairs."""
    _, pipeline, batches = several_objectives()
    whole, *parts = (Validation(pipeline) for _ in range(3))
    whole.add(batches)
    for part, batch in zip(parts, batches):
        part.add([batch])
    merged = Validation(pipeline).measures
    for name, measure in merged.items():
        for part in parts:
            measure.merge(part.measures[name].counts())
        assert measure.figures() == pytest.approx(whole.measures[name].figures()) and measure.figures(), name
    assert len({type(measure) for measure in merged.values()}) == 3


def test_a_measure_without_figures_does_not_end_a_run():
    """Embeddings that are not finite have no recall: the others are measured, and the console says why it is not."""
    config = small_perceiver_fusion()
    device = setup.initialize(ParallelSizes(), 1)
    pipeline = Assembly.of(config, ParallelSizes()).build(device, config.training.seed)
    for chunk in pipeline.chunks:
        chunk.eval()
    validation = Validation(pipeline)
    validation.add([GeneratedRows(config).microbatch(range(4))])
    (recall,) = (measure for measure in validation.measures.values() if isinstance(measure, Retrieval))
    recall.embeddings[0][0][0] = torch.nan
    found, line = validation.figures(), validation.console_line()
    assert "validation_loss" in found and any(key.endswith("_accuracy") for key in found)
    assert not any("recall" in key for key in found)
    assert f"{recall.loss.name} not measured: " in line and "not finite" in line


def test_what_was_counted_apart_is_merged():
    class Loss:
        name, fields, sharded, reads = "x", frozenset(), False, ("logits",)

    whole, parts = TokenAccuracy(Loss), [TokenAccuracy(Loss) for _ in range(2)]
    for part, (right, truth) in zip(parts, ((2, [1, 1, 2]), (1, [2, 2]))):
        part.right, _ = right, part.truth.update(truth)
        whole.merge(part.counts())
    assert whole.figures() == {"accuracy": 3 / 5, "majority": 3 / 5, "tokens": 5}


class Unmerged:
    """Of before: it adds and has figures."""

    def __init__(self, loss) -> None:
        pass


def test_a_measure_that_cannot_be_merged_is_refused_by_name():
    config = small_sensor()
    device = setup.initialize(ParallelSizes(), 1)
    pipeline = Assembly.of(config, ParallelSizes()).build(device, 1)
    (loss,) = pipeline.graph.losses
    object.__setattr__(loss, "measure", Unmerged)
    with pytest.raises(ValueError, match="loss 'causal_lm': its measure is a Unmerged, which cannot be merged"):
        Validation(pipeline)
    object.__setattr__(loss, "measure", None)
    assert Validation(pipeline).measures == {}
