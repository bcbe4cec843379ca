"""Shards of sentences against nltk, SentencePiece and megatron-core's own builder, one document at a time."""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from examples.data.packages import Package, fetch
from megatron_mm.data.build.text import Sentences, build_text
from megatron_mm.data.jobs import unfinished
from megatron_mm.data.store.indexed import IndexedReader
from megatron_mm.data.tokens.sentences import MAX_CHARACTERS, SentenceSplitter
from megatron_mm.media.errors import DataError
from tests.support.programs import PYTHON

pytestmark = pytest.mark.interface

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [
    "Dr. Smith went to Washington. He arrived at 3.14 p.m. on Jan. 5th!  Was it late? (It was.) Yes.",
    "",
    "One line\nand another. A third\n\none; no full stop",
    "   \n ",
    "Ends with space. \n",
    "«Ça va?» dit-elle. Œuvre n° 5. 終わり。次の文。",
    "A. " * 40 + "B.",
]
LONG = "One sentence here. " * 60_000


@pytest.fixture(scope="session")
def nltk_data(tmp_path_factory) -> str:
    """nltk's tables, which llama-index-core carries (the Punkt models of nltk, Apache-2.0)."""
    wanted = r"llama_index/core/_static/nltk_cache/tokenizers/punkt_tab/(english|french)/.*"
    package = Package("pip", "llama-index-core", "0.14.25", wanted, "MIT")
    folder = fetch(package, tmp_path_factory.mktemp("nltk") / "tables")
    return str(folder / "llama_index/core/_static/nltk_cache")


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 30))
    return path


@pytest.mark.parametrize("append_eod", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_bytes_are_those_of_megatrons_builder(corpus, tokenizer_path, nltk_data, tmp_path, append_eod, workers):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from nltk.tokenize.punkt import PunktTokenizer

    build_text([str(corpus)], str(tmp_path / "ours"), tokenizer_path, append_eod=append_eod, workers=workers,
               progress=False, sentences=Sentences(nltk_data=nltk_data))  # fmt: skip
    model, punkt = sentencepiece.SentencePieceProcessor(model_file=tokenizer_path), PunktTokenizer("english")
    builder = IndexedDatasetBuilder(str(tmp_path / "peer.bin"), dtype=DType.optimal_dtype(model.get_piece_size()))
    for text in TEXTS * 30:
        sentences = [ids for sentence in punkt.tokenize(text) if (ids := model.encode(sentence))]
        if sentences and append_eod:
            sentences[-1].append(model.eos_id())
        builder.add_document([i for ids in sentences for i in ids], [len(ids) for ids in sentences])
    builder.finalize(str(tmp_path / "peer.idx"))
    for suffix in (".bin", ".idx"):
        assert filecmp.cmp(tmp_path / f"ours_text_sentence{suffix}", tmp_path / f"peer{suffix}", shallow=False)
    reader = IndexedReader(tmp_path / "ours_text_sentence")
    assert reader.sequence_lengths.size > len(reader) == 30 * len(TEXTS) and not reader.damaged()
    assert np.array_equal(reader.document_lengths(), [reader.document(d).size for d in range(len(reader))])


@pytest.mark.slow
def test_sentences(nltk_data):
    split = SentenceSplitter(folder=nltk_data)
    assert split(TEXTS[0])[:2] == ["Dr. Smith went to Washington.", "He arrived at 3.14 p.m. on Jan. 5th!"]
    keeping = SentenceSplitter(folder=nltk_data, keep_space=True)
    for text in TEXTS:
        assert "".join(keeping(text)) == text.rstrip() and [s.strip() for s in keeping(text)] == [
            s.strip() for s in split(text)
        ]
    assert SentenceSplitter("french", nltk_data)("Mme. Curie vient. Elle part.")[-1] == "Elle part."
    long = LONG * 2  # more than two windows
    assert len(split(long)) in (120_000, 120_002) and "".join(keeping(long)).count("One") == 120_000


def test_no_document_takes_too_long(nltk_data, monkeypatch):
    """However slow the machine: with a limit of no time at all, nltk itself gives up, on the shortest text too."""
    redos = pytest.importorskip("nltk.redos", reason="this release of nltk has no limit")
    from nltk.tokenize.punkt import PunktTokenizer

    split, punkt = SentenceSplitter(folder=nltk_data), PunktTokenizer("english")
    wanted = [punkt.tokenize(text) for text in TEXTS]
    monkeypatch.setattr(redos, "DEFAULT_TIMEOUT", 0.0)
    with pytest.raises(TimeoutError):
        punkt.tokenize(TEXTS[0])
    assert [split(text) for text in TEXTS] == wanted
    assert redos.DEFAULT_TIMEOUT == 0.0, "the limit of others stays"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_long_documents_are_cut_and_counted(tokenizer_path, nltk_data, tmp_path, workers, monkeypatch):
    """Also by a build that was stopped by a bad line and continued. Truth: nltk on pieces that were cut here."""
    from nltk.tokenize.punkt import PunktTokenizer

    monkeypatch.setattr(unfinished, "JOURNAL_SECONDS", -1)
    sentences = Sentences(nltk_data=nltk_data)

    def build(lines: list[str], name: str) -> dict[str, float]:
        source = tmp_path / "long.jsonl"
        source.write_text("".join(lines))
        (report,) = build_text([str(source)], str(tmp_path / name), tokenizer_path, workers=workers, progress=False,
                               sentences=sentences).values()  # fmt: skip
        return report

    long, short = (json.dumps({"text": text}) + "\n" for text in (LONG, LONG[:MAX_CHARACTERS]))
    with pytest.raises(DataError, match="line 3: not JSON"):
        build([long, short, "{oops\n", long], "x")
    assert build([long, short, long], "x")["cut"] == 2
    manifest = json.loads((tmp_path / "x_text_sentence.json").read_text())
    assert manifest["counts"]["cut"] == 2 and manifest["options"]["sentences"]["max_characters"] == MAX_CHARACTERS
    assert "cut" not in build([short], "y")
    punkt, model = PunktTokenizer("english"), sentencepiece.SentencePieceProcessor(model_file=tokenizer_path)
    pieces = LONG[:MAX_CHARACTERS], LONG[MAX_CHARACTERS:]
    wanted = model.encode([sentence for piece in pieces for sentence in punkt.tokenize(piece)])
    reader = IndexedReader(tmp_path / "x_text_sentence")
    assert len(reader) == 3
    for document in (0, 2):
        assert np.array_equal(reader.document(document), [token for ids in wanted for token in ids])


def test_missing_tables_and_languages_are_named(nltk_data, tmp_path):
    with pytest.raises(DataError, match=r"punkt_tab/klingon is not in .*pass --nltk-data"):
        SentenceSplitter("klingon", nltk_data)
    with pytest.raises(DataError, match=r"--nltk-data .*nowhere: no such folder"):
        SentenceSplitter("english", str(tmp_path / "nowhere"))


@pytest.mark.slow
def test_the_tool(corpus, tokenizer_path, nltk_data, tmp_path):
    with corpus.open("a") as stream:
        stream.write(json.dumps({"text": LONG}) + "\n")
    command = [PYTHON, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(corpus), "--split-sentences"]
    command += ["--output-prefix", str(tmp_path / "t"), "--tokenizer-model", tokenizer_path, "--workers", "1"]
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("NLTK_DATA", None)
    failed = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment)
    assert failed.returncode == 1 and "nltk's table" in failed.stderr and "Traceback" not in failed.stderr
    done = subprocess.run([*command, "--nltk-data", nltk_data], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "cut 1 documents into pieces of 1,000,000 characters: a sentence across a cut is two" in done.stdout
    assert (tmp_path / "t_text_sentence.idx").exists()
