"""Text preprocessing: equal to the per-document loop, for any worker count, and clean after bad input."""

from __future__ import annotations

import filecmp
import gzip
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from megatron_mm.data.build.merge import merge_datasets
from megatron_mm.data.build.text import build_text
from megatron_mm.data.build.train_tokenizer import train_tokenizer
from megatron_mm.data.store.indexed import IndexedReader
from megatron_mm.data.tokens.tokenizer import open_tokenizer
from megatron_mm.media.errors import DataError
from tests.data.real_texts import real_texts
from tests.support.programs import PYTHON

pytestmark = pytest.mark.interface

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "c.jsonl"
    path.write_text("".join(json.dumps({"text": t, "title": t[:5]}) + "\n" for t in real_texts()))
    return path


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def model(request, tmp_path_factory, corpus) -> str:
    path = str(tmp_path_factory.mktemp("model") / "t.model")
    train_tokenizer([str(corpus)], path, 1500, request.param, num_threads=2)
    return path


@pytest.mark.slow
def test_same_bytes_as_the_per_document_loop(tmp_path, corpus, model):
    """The oracle is megatron-core's builder fed one document at a time, as Megatron's script does."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    sp = sentencepiece.SentencePieceProcessor(model_file=model)
    builder = IndexedDatasetBuilder(str(tmp_path / "peer.bin"), dtype=DType.optimal_dtype(sp.get_piece_size()))
    for line in corpus.read_text().splitlines():
        ids = sp.encode(json.loads(line)["text"])
        ids = [*ids, sp.eos_id()] if ids else []
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(str(tmp_path / "peer.idx"))
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(corpus.read_bytes()))
    for source, workers in ((corpus, 0), (corpus, 3), (packed, 2)):
        prefix = str(tmp_path / f"ours{workers}")
        build_text([str(source)], prefix, model, append_eod=True, workers=workers, progress=False)
        for suffix in (".bin", ".idx"):
            assert filecmp.cmp(tmp_path / f"peer{suffix}", f"{prefix}_text_document{suffix}", shallow=False)


def test_several_keys_no_eod_and_merge(tmp_path, corpus, model):
    prefix = str(tmp_path / "k")
    report = build_text([str(corpus)], prefix, model, json_keys=["text", "title"], workers=0, progress=False)
    text, title = (IndexedReader(f"{prefix}_{key}_document") for key in ("text", "title"))
    tokenizer = open_tokenizer(model)
    last = json.loads(corpus.read_text().splitlines()[-1])
    assert text.document(len(text) - 1).tolist() == tokenizer.encode(last["text"])
    assert title.document(len(title) - 1).tolist() == tokenizer.encode(last["title"])
    assert report[f"{prefix}_text_document"]["tokens"] == text.data.size
    merge_datasets([f"{prefix}_text_document", f"{prefix}_title_document"], str(tmp_path / "both"), progress=False)
    both = IndexedReader(tmp_path / "both")
    assert np.array_equal(both.data, np.concatenate([text.data, title.data]))
    assert both.document_lengths().tolist() == [*text.document_lengths(), *title.document_lengths()]


def test_lines_are_what_python_takes_for_json(tmp_path, model):
    lines = [b'\xef\xbb\xbf{"text": "first"}', b'{"score": NaN, "text": "second"}', b'{"id": 1e400, "text": "third"}']
    lines += [b'{"text": "left out", "text": "fourth", "id": %d}' % 2**80, b'{"text": "\\ud83d\\ude00"}\r']
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"\n".join(lines))
    build_text([str(path)], str(tmp_path / "p"), model, workers=0, progress=False)
    made, tokenizer = IndexedReader(tmp_path / "p_text_document"), open_tokenizer(model)
    for number, text in enumerate(["first", "second", "third", "fourth", "😀"]):
        assert made.document(number).tolist() == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{oops", "not JSON"),
        (b'{"txt": "a"}', 'lacks the field "text"'),
        (b'{"text": 3}', 'field "text" must be a string, not int'),
        (b"[1]", "must be a JSON object, not list"),
        (b'{"text": "\xff\xfe"}', "not UTF-8"),
        (b'{"text": "half \\ud800 pair"}', "not UTF-8"),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_line_is_named_and_nothing_is_left(tmp_path, model, line, message, workers, monkeypatch):
    monkeypatch.setattr("megatron_mm.data.build.text._BLOCK_BYTES", 1 << 12)  # it is in the seventeenth block
    path = tmp_path / "in" / "bad.jsonl"
    path.parent.mkdir()
    path.write_bytes(b'{"text": "fine"}\n' * 4000 + b"\n" + line + b'\n{"text": "fine"}\n{no')
    with pytest.raises(DataError, match=rf"bad\.jsonl, line 4002: .*{message}"):
        build_text([str(path)], str(tmp_path / "out" / "p"), model, workers=workers, progress=False)
    assert list((tmp_path / "out").iterdir()) == []


def test_long_line_damaged_gzip_and_existing_output(tmp_path, model, monkeypatch):
    monkeypatch.setattr("megatron_mm.data.build.text.MAX_LINE_BYTES", 1000)
    monkeypatch.setattr("megatron_mm.data.build.text._BLOCK_BYTES", 100)
    path = tmp_path / "long.jsonl"
    path.write_text('{"text": "a"}\n' + json.dumps({"text": "b" * 3000}) + "\n")
    with pytest.raises(DataError, match="line 2: longer than 1000 bytes"):
        build_text([str(path)], str(tmp_path / "p"), model, workers=0, progress=False)
    packed = tmp_path / "cut.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "a b c"}\n' * 5000)[:-20])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz: damaged gzip"):
        build_text([str(packed)], str(tmp_path / "p"), model, workers=0, progress=False)
    path.write_text('{"text": "a"}\n')
    build_text([str(path)], str(tmp_path / "p"), model, workers=0, progress=False)
    with pytest.raises(DataError, match=r"exists already.*--overwrite"):
        build_text([str(path)], str(tmp_path / "p"), model, workers=0, progress=False)
    build_text([str(path)], str(tmp_path / "p"), model, workers=0, progress=False, overwrite=True)


@pytest.mark.slow
def test_the_tool(tmp_path, corpus, model):
    def run(*command):
        return subprocess.run([PYTHON, *command], capture_output=True, encoding="utf-8", cwd=tmp_path)

    tool = [str(ROOT / "tools/preprocess_data.py"), "--output-prefix", "p", "--tokenizer-model", model, "--append-eod"]
    done = run(*tool, "--input", str(corpus), "--workers", "1", "--log-interval", "10")
    assert done.returncode == 0 and "p_text_document.bin" in done.stdout, done.stderr
    missing = run(*tool, "--input", "nothing.jsonl")
    assert missing.returncode == 1 and missing.stderr.strip() == "error: nothing.jsonl: no such file"
