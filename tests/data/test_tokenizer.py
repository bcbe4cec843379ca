"""Tokenizer and its training."""

from __future__ import annotations

import gzip
import json
import subprocess
from pathlib import Path

import pytest
import sentencepiece

from megatron_mm.data.build.train_tokenizer import train_tokenizer
from megatron_mm.data.tokens.tokenizer import open_tokenizer
from megatron_mm.media.errors import DataError
from tests.support.programs import PYTHON

pytestmark = pytest.mark.interface

TOOLS = Path(__file__).parents[2] / "tools"


def test_special_ids_and_round_trip(tokenizer_path):
    tokenizer = open_tokenizer(tokenizer_path)
    ids = [tokenizer.pad_id, 1, tokenizer.bos_id, tokenizer.eos_id]
    ids += [tokenizer.image_id, tokenizer.audio_id, tokenizer.video_id, tokenizer.mask_id]
    assert ids == list(range(8))
    text = "a red ball 象 ☃"
    assert tokenizer.decode(tokenizer.encode(text)) == text, "byte fallback keeps characters it never saw"
    assert tokenizer.encode("<image>").count(tokenizer.image_id) == 1
    assert tokenizer.encode("x<video>y<audio>").count(tokenizer.video_id) == 1


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_training_from_text_and_gzip_without_learning_placeholders(tmp_path, model_type):
    plain, packed = tmp_path / "a.txt", tmp_path / "b.jsonl.gz"
    plain.write_text("the cat sat <image> on the mat\n" * 50)
    with gzip.open(packed, "wt") as stream:
        lines = {"text": "<image> the dog imaged the log"}, {"other": 1, "text": "x"}
        stream.write("\n".join(map(json.dumps, lines)))
    path = str(tmp_path / "t.model")
    size = train_tokenizer([str(plain), str(packed)], path, 400, model_type)
    tokenizer = open_tokenizer(path)
    assert size == tokenizer.vocab_size < 400, "a small corpus yields fewer pieces"
    pieces = [tokenizer.processor.id_to_piece(i) for i in range(8, size)]
    assert not any("<image" in piece or "image>" in piece for piece in pieces)


def test_tool_says_that_the_corpus_is_small(tmp_path, samples):
    command = [PYTHON, str(TOOLS / "train_tokenizer.py"), "--input", str(samples), "--vocab-size", "5000"]
    run = subprocess.run(
        [*command, "--output", str(tmp_path / "t.model")], capture_output=True, encoding="utf-8", check=True
    )
    assert "too small for 5000 pieces" in run.stdout
    run = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert run.returncode == 2, "usage errors are 2"


def test_errors_name_what_is_wrong(tmp_path, samples):
    with pytest.raises(DataError, match=r"missing\.model: cannot be read"):
        open_tokenizer(tmp_path / "missing.model")
    (tmp_path / "bad.model").write_bytes(b"hello")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        open_tokenizer(tmp_path / "bad.model")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d"] * 20), model_prefix=str(tmp_path / "plain"), vocab_size=8,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"lacks the special tokens <pad>.*<image>.*train_tokenizer"):
        open_tokenizer(tmp_path / "plain.model")
    assert open_tokenizer(tmp_path / "plain.model", require_media=False).eos_id == 2
    with pytest.raises(DataError, match="--vocab-size 10"):
        train_tokenizer([str(samples)], str(tmp_path / "t.model"), 10)
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(DataError, match=r"x.jsonl, line 2: has none of the text fields text"):
        train_tokenizer([str(tmp_path / "x.jsonl")], str(tmp_path / "t.model"), 300)
    assert not (tmp_path / "t.model").exists()
