"""Swapped media, token loss against a sum over single samples, and tools/evaluate.py on an exported model."""

import json
import math
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_mm.data.tokens.tokenizer import open_tokenizer
from megatron_mm.evaluation.classification import word_f1
from megatron_mm.evaluation.evaluate import swap_media, token_scores
from megatron_mm.generation.generate import Generator
from megatron_mm.hf.processing_mm import MultimodalProcessor
from tests.conversion.export_case import draw, hf_model, sing, tiny_recipe, train_tokenizer
from tests.support.programs import PYTHON

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def generator(tmp_path):
    model = hf_model(tiny_recipe())
    tokenizer = open_tokenizer(train_tokenizer(tmp_path / "tokenizer.model"))
    return Generator(model, MultimodalProcessor(model.config, tokenizer))


@pytest.fixture
def samples(tmp_path):
    pictures = [str(draw(tmp_path / f"{i}.png", (30 + 9 * i, 40))) for i in range(3)]
    sounds = [str(sing(tmp_path / f"{i}.wav", pitch=300.0 * (i + 1))) for i in range(2)]
    return [
        {"id": "a", "prompt": "<image>", "text": "a red dog", "images": pictures[:1]},
        {"id": "b", "prompt": "<audio> what is this sound", "text": "the cat sings", "audios": sounds[:1]},
        {"id": "c", "prompt": None, "text": "one two three"},
        {"id": "d", "prompt": "<image><image>", "text": "green and blue <image>", "images": pictures},
        {"id": "e", "prompt": "<audio>", "text": "dog", "audios": sounds[1:]},
        {"id": "f", "prompt": "<image>", "text": "moon", "images": pictures[2:]},
    ]


def test_loss_and_accuracy_are_means_over_all_learned_tokens_however_batched(generator, samples):
    total, right, count = 0.0, 0, 0
    states, head = [], generator.model.lm_head
    hook = head.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    token_scores(generator, samples[2:3])
    hook.remove()
    with torch.no_grad():  # so that one end at least is likeliest, and no padded row counts
        head.weight[generator.processor.config.eos_token_id] = 10 * states[0][0, -2]
    processor = generator.processor
    samples[3]["prompt"], samples[3]["text"] = "<image><image><image>", "green and blue"
    for sample in samples:
        inputs = processor([sample])
        text = [*processor.tokenizer.encode(sample["text"]), processor.config.eos_token_id]
        start = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([text])], dim=1)
        inputs.pop("attention_mask")
        with torch.no_grad():
            log_probabilities = generator.model(**inputs, use_cache=False).logits[0].log_softmax(-1)
        total -= sum(log_probabilities[start - 1 + i, token].item() for i, token in enumerate(text))
        pieces = log_probabilities[:, : processor.tokenizer.vocab_size]
        right += sum(pieces[start - 1 + i].argmax().item() == token for i, token in enumerate(text))
        count += len(text)
    assert 0 < right < count
    for batch_size in (1, 4, 6):
        found = token_scores(generator, samples, batch_size)
        assert (found.loss, found.accuracy) == (pytest.approx(total / count, rel=1e-5), right / count)


def test_swapped_media_are_a_derangement_within_each_kind():
    texts = ["dog", "cat", "dog", "moon", "sun", "cat", "tree"]
    samples = [{"id": str(i), "text": text, "images": [f"{i}.png"]} for i, text in enumerate(texts)]
    samples += [{"id": f"s{i}", "text": f"sound {i}", "audios": [f"{i}.wav"]} for i in range(2)]
    samples += [{"id": "none", "text": "nothing"}]
    owner = {f"{i}.png": text for i, text in enumerate(texts)}
    for seed in range(20):
        swapped = swap_media(samples, seed)
        assert [s["id"] for s in swapped] == [s["id"] for s in samples]
        given = [s["images"][0] for s in swapped[:7]]
        assert sorted(given) == sorted(owner)
        assert all(owner[picture] != sample["text"] for picture, sample in zip(given, swapped))
        assert [s["audios"] for s in swapped[7:9]] == [["1.wav"], ["0.wav"]]
        assert swapped[9] == samples[9]
    assert samples[0]["images"] == ["0.png"], "the samples given are left alone"


def test_media_that_cannot_be_swapped_are_refused():
    samples = [{"text": text, "images": ["x.png"]} for text in ("dog", "dog", "dog", "cat")]
    with pytest.raises(ValueError, match="of 4 samples with 1 images, 3 share a text"):
        swap_media(samples)


def test_a_sample_without_text_is_named(generator):
    with pytest.raises(ValueError, match='sample 7: field "text"'):
        token_scores(generator, [{"id": "7", "prompt": "<image>", "text": " "}])


@pytest.mark.slow
def test_the_tool_scores_an_exported_folder(generator, samples, tmp_path):
    folder = tmp_path / "exported"
    generator.model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((tmp_path / "tokenizer.model").read_bytes())
    samples = [s for s in samples if s["id"] in "aebf"]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    command = [PYTHON, ROOT / "tools" / "evaluate.py", "--model", folder, "--input", tmp_path / "held.jsonl"]
    options = ["--swap-media", "--max-new-tokens", "4", "--json", tmp_path / "scores.json"]
    options += ["--captions", tmp_path / "captions.jsonl"]
    done = subprocess.run([*map(str, command), *map(str, options)], capture_output=True, encoding="utf-8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "scores.json").read_text())["rows"]
    assert [row["media"] for row in rows] == ["true", "swapped"] and "exact match" in done.stdout
    assert rows[0]["samples"] == 4 and math.isfinite(rows[0]["token_loss"])
    assert rows[0]["token_accuracy"] == token_scores(generator, samples).accuracy and "token accuracy" in done.stdout
    assert rows[0]["token_loss"] == pytest.approx(token_scores(generator, samples).loss, rel=1e-4)
    assert rows[1]["token_loss"] == pytest.approx(token_scores(generator, swap_media(samples)).loss, rel=1e-4)
    assert abs(rows[0]["token_loss"] - rows[1]["token_loss"]) > 1e-4
    captions = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert len(captions) == 8
    for row in rows:
        said = [line for line in captions if line["media"] == row["media"]]
        pairs = [(line["generated"], line["reference"]) for line in said]
        assert row["word_f1"] == pytest.approx(sum(word_f1([text], [[truth]]) for text, truth in pairs) / 4)
        # Every text is another class: all recalls have the same weight.
        assert row["classes"] == 4 and row["majority"] == 0.25
        assert row["weighted_recall"] == row["unweighted_recall"] == row["exact_match"]
    header, *lines = done.stdout.splitlines()[-3:]
    headings = "samples of media count classes exact match CIDEr-D word F1 WAR UAR macro F1 commonest token loss "
    headings += "token accuracy"
    assert " ".join(header.split()) == headings
    for line, row in zip(lines, rows):
        shown = [row[key] for key in ("exact_match", "cider", "word_f1", "weighted_recall", "unweighted_recall")]
        shown += [row[key] for key in ("macro_f1", "majority", "token_loss", "token_accuracy")]
        assert line.split() == ["held.jsonl", row["media"], "4", "4", *(f"{value:.3f}" for value in shown)]

    done = subprocess.run([*map(str, command), "--limit", "1", "--swap-media"], capture_output=True, encoding="utf-8")
    assert done.returncode == 1 and "cannot be swapped" in done.stderr and "Traceback" not in done.stderr
