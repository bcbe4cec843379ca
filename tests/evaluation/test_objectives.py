"""Figures of objectives against the trainer's own loss of the same rows, and against values worked out by hand."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_mm.checkpoints.checkpoint import Position
from megatron_mm.checkpoints.save import save
from megatron_mm.config.section import changed
from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.evaluation.objectives import score_objectives
from megatron_mm.evaluation.streams import GraphReader, all_rows, reading_jsonl
from megatron_mm.models.graph import ForwardContext
from megatron_mm.objectives.mae import mae_loss
from megatron_mm.objectives.masked_lm import masked_lm_loss
from megatron_mm.objectives.matching import matching_loss
from megatron_mm.objectives.measures import MaskedPatches, Matching, MeanLoss, Retrieval, TokenAccuracy
from megatron_mm.pipeline.schedule import run_batch
from megatron_mm.planner.assembly import Assembly
from megatron_mm.platform import setup
from megatron_mm.systems.vlm.section import VLMConfig
from megatron_mm.training.optimizer import Optimizer
from tests.support.corpus import build_corpus, corpus_config
from tests.support.programs import PYTHON
from tests.support.recipes import small_vlm

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def config(corpus, tmp_path):
    config = corpus_config(*corpus, tmp_path / "run")
    return replace(config, parallel=replace(config.parallel, sequence_parallel=False))


def rows(texts: list[list[int]], images: list[int]) -> Microbatch:
    """Rows of token ids, padded, row i with image images[i] (-1: none)."""
    length = max(map(len, texts))
    tokens = torch.tensor([text + [0] * (length - len(text)) for text in texts])
    documents = torch.tensor([[0] * len(text) + [-1] * (length - len(text)) for text in texts])
    count = len(texts)
    plan = MicrobatchPlan(count, length, max(1, sum(i >= 0 for i in images)), 1, 1, 1, True, length)
    return Microbatch(
        plan=plan,
        document_ids_RT=documents,
        position_ids_RT=torch.arange(length).repeat(count, 1),
        loss_mask_RT=torch.zeros(count, length),
        image_slots_RK=torch.tensor(images)[:, None],
        image_slot_documents_RK=torch.zeros(count, 1, dtype=torch.int64),
        sound_slots_RJ=torch.full((count, 1), -1),
        sound_slot_documents_RJ=torch.full((count, 1), -2),
        tokens_RT=tokens,
        sample_numbers_R=torch.arange(count),
    )


def test_figures_of_a_whole_system_are_the_trainers_loss_and_the_likeliest_tokens(config):
    reader = GraphReader(config)
    figures = score_objectives(reader, config, batch_size=7)
    sizes = ParallelSizes()
    pipeline = Assembly.of(config, sizes).build(reader.device, config.training.seed)
    batches = list(all_rows(config, pipeline.fields(), batch_size=7))
    of_trainer = run_batch(pipeline, batches, forward_only=True).losses
    assert figures["causal_lm/loss"] == pytest.approx(of_trainer["causal_lm"])
    right = count = 0
    for batch in batches:
        logits = reader.run(batch, ["logits"])[0]["logits"]
        found = logits.squeeze(1).argmax(-1).reshape(batch.labels_RT.shape)
        right += ((found == batch.labels_RT) * batch.loss_mask_RT).sum()
        count += batch.loss_mask_RT.sum()
    assert figures["causal_lm/tokens"] == count and figures["causal_lm/accuracy"] == pytest.approx(float(right / count))
    assert sum(batch.plan.num_rows for batch in batches) > 7, "several microbatches, the last of them smaller"


def test_only_the_nodes_that_a_stream_needs_are_run(config):
    reader = GraphReader(config)
    names = [reader.graph.nodes[number].name for number in reader.graph.needed(["audio_memory"])]
    assert names and all(name.startswith("audio.") for name in names)
    assert reader.fields(["audio_memory"]) == {"sounds_AMF"}
    assert len(reader.graph.needed(["logits"])) == len(reader.graph.nodes)
    with pytest.raises(ValueError, match="no stream nothing; there are "):
        reader.run(rows([[1]], [-1]), ["nothing"])


def test_rows_come_once_in_the_order_of_the_samples(corpus):
    config = changed(small_vlm(), {"model.decoder.vocab_size": 304})
    samples = corpus[0].parent / "samples.jsonl"
    with reading_jsonl(config, samples, corpus[1]) as held_out:
        batches = list(all_rows(held_out, {"tokens_RT"}, batch_size=50, limit=110))
    ids = [name.split("/")[1] for batch in batches for name in batch.sample_ids]
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert ids == [line["id"] for line in lines][:110]
    assert [batch.plan.num_rows for batch in batches] == [50, 50, 10]


@pytest.mark.slow
def test_a_checkpoint_is_scored_beside_the_untrained_model_from_the_command_line(config, corpus, tmp_path):
    device = setup.initialize(ParallelSizes(), 1)
    pipeline = Assembly.of(config, ParallelSizes()).build(device, seed=99)
    folder = save(config, tmp_path, pipeline, Optimizer(config, pipeline), Position(1, 1))
    expected = {}
    samples = corpus[0].parent / "samples.jsonl"
    for trained in (True, False):
        reader = GraphReader.from_path(folder, trained)
        with reading_jsonl(reader.config, samples, corpus[1]) as held_out:
            expected["trained" if trained else "untrained"] = score_objectives(reader, held_out)
    assert expected["trained"]["causal_lm/loss"] != expected["untrained"]["causal_lm/loss"]

    def tool(checkpoint, *words):
        command = [PYTHON, "tools/score_objectives.py", "--input", samples, "--checkpoint", checkpoint, *words]
        return subprocess.run([*map(str, command)], capture_output=True, encoding="utf-8", cwd=ROOT)

    done = tool(folder, "--untrained", "--json", tmp_path / "s.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "s.json").read_text()) == {
        model: pytest.approx(figures) for model, figures in expected.items()
    }
    assert "causal_lm/accuracy" in done.stdout
    done = tool(tmp_path / "no")
    assert done.returncode == 1 and "error: " in done.stderr and "no: no such folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_retrieval_is_over_all_rows_that_have_both_sides():
    class Loss:
        reads = ("image_embedding", "text_embedding", "logit_scale")

    measure = Retrieval(Loss)
    eye = torch.eye(5)
    first = rows([[1, 5], [1, 6, 7], [1, 8]], [0, -1, 1])
    measure.add({"image_embedding": eye[:3], "text_embedding": eye[:3]}, ForwardContext(first))
    # the third pair of this one has the text of the second row before it: a picture finds either
    second = rows([[1, 9], [1, 5], [1, 10]], [0, 1, 2])
    images, texts = torch.stack((eye[3], eye[0], eye[4])), torch.stack((eye[4], eye[0], eye[3]))
    measure.add({"image_embedding": images, "text_embedding": texts}, ForwardContext(second))
    figures = measure.figures()
    assert figures["image_to_text/queries"] == figures["text_to_image/candidates"] == 5
    assert figures["image_to_text/recall_at_1"] == pytest.approx(3 / 5)
    assert figures["image_to_text/chance"] == pytest.approx((2 + 1 + 1 + 2 + 1) / 25)


def test_accuracy_of_masked_tokens_counts_the_hidden_ones():
    batch = rows([[2, 5, 6, 7], [2, 5, 9]], [-1, -1])
    batch.masked_loss_mask_RT = torch.tensor([[0.0, 1, 1, 0], [0, 1, 0, 0]])
    batch.masked_labels_RT = (batch.tokens_RT * batch.masked_loss_mask_RT).long()
    measures = [masked_lm_loss().measure(masked_lm_loss()), MeanLoss(masked_lm_loss())]
    logits = torch.zeros(8, 1, 12)
    for position, token in ((1, 5), (2, 5), (5, 5), (6, 9)):
        logits[position, 0, token] = 3.0
    setup.initialize(ParallelSizes(), 1)
    for measure in measures:
        measure.add({"logits": logits}, ForwardContext(batch))
    assert isinstance(measures[0], TokenAccuracy)
    figures = measures[0].figures()
    assert figures["accuracy"] == pytest.approx(2 / 3) == figures["majority"] and figures["tokens"] == 3
    assert logits[1, 0, 5] == 3.0, "megatron-core's cross-entropy works on a copy"


def test_matching_is_balanced_between_true_and_false_pairs():
    measure = Matching(matching_loss())
    batch = rows([[1], [2], [3], [4]], [0, 1, 2, 3])
    logits = torch.tensor([[-0.6, 0]] * 3 + [[-0.8, 0]] + [[-0.8, 0]] * 2 + [[-0.6, 0]] * 6)  # around the odds 1 : 2
    valid = torch.ones(12)
    valid[11] = 0
    measure.add({"match_logits": logits, "match_valid": valid}, ForwardContext(batch))
    assert measure.figures()["accuracy"] == pytest.approx((3 / 4 + 2 / 7) / 2)


def test_masked_patches_stand_beside_the_prediction_of_their_mean():
    config = changed(VLMConfig(phase="mae"), {"vision.image_size": 8, "vision.patch_size": 4, "mae.mask_ratio": 0.5})
    batch = rows([[1], [2]], [0, 1])
    torch.manual_seed(0)
    batch.images_ICHW, batch.patch_noise_IP = torch.randn(2, 3, 8, 8), torch.rand(2, 4)
    batch.images_ICHW[1] = 0.7  # one colour: its normed patches are zero
    loss, figures = mae_loss(config.vision, config.mae), {}
    for measure in (MeanLoss(loss), MaskedPatches(loss)):
        measure.add({"mae_prediction": torch.full((2, 4, 48), 2.0)}, ForwardContext(batch))
        figures |= measure.figures()
    # An unbiased deviation leaves the mean square at 47/48; a prediction of 2 adds its square to both.
    assert figures["loss_of_mean"] == pytest.approx(47 / 48 / 2, rel=1e-4)
    assert figures["loss"] == pytest.approx(47 / 48 / 2 + 4, rel=1e-4)
