"""Every kind of tokenizer under one protocol: the same battery, datasets built with bytes, a kind of a plugin's own."""

from __future__ import annotations

import json
import pickle
import subprocess
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from megatron_mm.config.section import changed
from megatron_mm.data.build.multimodal import build_multimodal
from megatron_mm.data.build.text import build_text
from megatron_mm.data.reading.dataset import build_datasets
from megatron_mm.data.store.shards import Shard
from megatron_mm.data.tokens import tokenizer as registry
from megatron_mm.data.tokens.tokenizer import (
    ROLES,
    open_tokenizer,
    register_tokenizer,
    stored_name,
    tokenizer_in,
    tokenizer_kinds,
)
from megatron_mm.data.view.html_page import Entry, write_page
from megatron_mm.data.view.inspection import describe_sample, verify
from megatron_mm.media.errors import DataError
from tests.support.programs import PYTHON

TOOLS = Path(__file__).parents[2] / "tools"
PLUGIN = Path(__file__).parent / "letters_tokenizer.py"
TEXTS = ["a red ball", "", "象 ☃ <image>x<mask>", "a\x00b <video><audio>", "</s> is text here", "plain"]


@pytest.fixture(scope="module")
def byte_path(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("bytes") / "mine.json"
    path.write_text('{"kind": "bytes"}\n')
    return str(path)


@pytest.fixture(params=["sentencepiece", "bytes"])
def tokenizer(request, tokenizer_path, byte_path):
    opened = open_tokenizer({"sentencepiece": tokenizer_path, "bytes": byte_path}[request.param])
    assert opened.kind == request.param
    return opened


@pytest.fixture(scope="module")
def byte_folder(tmp_path_factory, samples, byte_path) -> str:
    output = str(tmp_path_factory.mktemp("built") / "balls")
    build_multimodal([str(samples)], output, byte_path, workers=0, progress=False)
    return output


@pytest.fixture
def registered(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))


# ------------------------------------------------------------------------------------------------- the same for all


def test_texts_come_back(tokenizer):
    for text in TEXTS:
        if (text and "\x00" not in text) or tokenizer.kind == "bytes":  # SentencePiece drops control characters
            assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = [tokenizer.bos_id, *tokenizer.encode("a ball"), tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(np.array(ids)) == "a ball", "control tokens vanish"


def test_special_tokens_are_found_by_role(tokenizer):
    assert [getattr(tokenizer, f"{role}_id") for role in ROLES] == list(range(8))
    assert tokenizer.placeholder_ids == {"images": 4, "audios": 5, "videos": 6}
    assert tokenizer.unlearned_ids == [0, 4, 5, 6]
    for role in ("image", "audio", "video", "mask"):
        index = getattr(tokenizer, f"{role}_id")
        assert tokenizer.encode(f"x{ROLES[role]}y").count(index) == 1 and tokenizer.piece(index) == ROLES[role]
        assert tokenizer.decode([index]) == ROLES[role]
    for role in ("pad", "bos", "eos"):  # a text cannot end itself
        assert getattr(tokenizer, f"{role}_id") not in tokenizer.encode(f"x {ROLES[role]} y")
    ordinary = tokenizer.is_ordinary()
    assert ordinary.shape == (tokenizer.vocab_size,) and not ordinary[:8].any() and ordinary[8:].sum() > 200


def test_blocks_are_encoded_as_texts_are(tokenizer):
    tokenizer.prepare()
    texts = [text for text in TEXTS if "\x00" not in text]
    wanted = [tokenizer.encode(text) for text in texts]
    batch = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == wanted and {ids.dtype for ids in batch} == {np.dtype(np.int32)}
    for eod in (None, tokenizer.eos_id):
        ids, lengths = tokenizer.block_encoder(eod)(texts)
        ends = [[*found, eod] if found and eod is not None else found for found in wanted]
        assert ids.tolist() == list(chain.from_iterable(ends)) and lengths.tolist() == list(map(len, ends))
        assert ids.dtype == lengths.dtype == np.int32


def test_ids_that_there_are_not_are_refused(tokenizer):
    with pytest.raises(IndexError):
        tokenizer.decode([9, tokenizer.vocab_size])


def test_worker_processes_get_the_same(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert type(copy) is type(tokenizer) and copy.identity == tokenizer.identity
    assert copy.encode("a ball") == tokenizer.encode("a ball")


def test_the_identity_is_the_tokenizers(tokenizer, tmp_path, tokenizer_path):
    content = Path(tokenizer.path).read_bytes()
    (tmp_path / "copy").write_bytes(content)
    assert open_tokenizer(tmp_path / "copy").identity == tokenizer.identity
    spaced = tmp_path / "spaced.json"
    spaced.write_text('{ "kind" : "bytes" }')
    assert (open_tokenizer(spaced).identity == tokenizer.identity) == (tokenizer.kind == "bytes")


def test_folders_name_the_file_by_its_kind(tokenizer, tmp_path):
    assert stored_name(tokenizer.path) == tokenizer.file_name
    assert tokenizer_in(tmp_path) is None
    (tmp_path / tokenizer.file_name).write_bytes(Path(tokenizer.path).read_bytes())
    assert open_tokenizer(tokenizer_in(tmp_path)).identity == tokenizer.identity


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", r'mine: not a SentencePiece model.*, nor the JSON object \{"kind": "bytes"\}'),
        (b"", "mine: not a SentencePiece model"),
        (b"\n\x05hello", "mine: not a SentencePiece model, or a damaged one"),
        (b'{"kind": "byte"}', "mine: is of the kind 'byte'; known kinds: sentencepiece, bytes .*--plugins"),
        (b'{"kind": "bytes", "size": 3}', "mine: the kind 'bytes' has no field 'size'"),
        (b'{"kind": "bytes"', "mine: not a SentencePiece model"),
        (b'["bytes"]', "mine: not a SentencePiece model"),
    ],
)
def test_what_nobody_reads_is_refused_by_name(content, message, tmp_path):
    (tmp_path / "mine").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_tokenizer(tmp_path / "mine")
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\)"):
        open_tokenizer(tmp_path)


# ------------------------------------------------------------------------------------------------ datasets of bytes


def test_datasets_of_bytes(byte_folder, folder, byte_path, tokenizer_path, samples, tmp_path):
    ours = open_tokenizer(byte_path)
    shard = Shard(byte_folder, ours)
    assert verify(shard, ours, progress=False) == []
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    for document in range(5):
        record, shown = lines[document], describe_sample(shard, document, ours)
        assert shown["text"] == record["text"] and shown.get("prompt", "") == record.get("prompt", "")
    write_page(str(tmp_path / "page.html"), [Entry(shard, [0, 1])], ours)
    assert "a green ball" in (tmp_path / "page.html").read_text()
    with pytest.raises(DataError, match="made with another tokenizer"):
        Shard(byte_folder, open_tokenizer(tokenizer_path))
    with pytest.raises(DataError, match="made with another tokenizer"):
        Shard(folder, ours)


def test_training_reads_them(config, byte_folder, byte_path):
    datasets = [changed(config.data.datasets[0], {"path": byte_folder})]
    config = changed(config, {"data.datasets": datasets, "data.tokenizer": byte_path})
    made = build_datasets(config)
    assert made.tokenizer.vocab_size == 264
    batch = made.train.microbatch(np.arange(2), frozenset({"tokens_RT", "labels_RT", "loss_mask_RT"}), "")
    ours, learned = made.tokenizer, batch.loss_mask_RT.bool()
    assert "ball, number" in ours.decode(batch.tokens_RT[0].tolist())
    assert learned.any() and not np.isin(batch.labels_RT[learned].numpy(), ours.unlearned_ids).any()


def test_text_shards_of_bytes(byte_path, tmp_path):
    texts = TEXTS * 40
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    ours = open_tokenizer(byte_path)
    for workers in (0, 2):
        prefix = str(tmp_path / f"w{workers}")
        build_text([str(tmp_path / "t.jsonl")], prefix, byte_path, append_eod=True, workers=workers, progress=False)
        shard = Shard(f"{prefix}_text_document", ours)
        wanted = [[*ours.encode(text), 3] if text else [] for text in texts]
        assert [shard.text.document(i).tolist() for i in range(len(shard))] == wanted


# ----------------------------------------------------------------------------------------------- kinds of a plugin's


def test_names_are_taken_once(registered):
    byte = tokenizer_kinds()[1]
    lacks = r"Half lacks (__init__, )?decode, encode, file_name, piece, reads, recognises"  # Python 3.10 gives it one
    with pytest.raises(ValueError, match=lacks):
        register_tokenizer(type("Half", (registry.Tokenizer,), {"kind": "half"}))
    with pytest.raises(ValueError, match="already a kind of tokenizer 'bytes'"):
        register_tokenizer(byte)
    with pytest.raises(ValueError, match=r"'bytes' already calls its file byte_tokenizer\.json"):
        register_tokenizer(type("Other", (byte,), {"kind": "other"}))


def test_a_plugins_kind_is_found_by_the_tools(tmp_path):
    (tmp_path / "abc.json").write_text('{"kind": "letters", "letters": "abc "}')
    (tmp_path / "t.jsonl").write_text('{"text": "cab a"}\n{"text": "bb"}\n')
    files = ["--tokenizer-model", str(tmp_path / "abc.json")]
    build = [PYTHON, str(TOOLS / "preprocess_data.py"), "--input", str(tmp_path / "t.jsonl"), "--append-eod", *files]
    build += ["--output-prefix", str(tmp_path / "o")]
    plugins = ["--plugins", str(PLUGIN)]
    run = subprocess.run(build, capture_output=True, encoding="utf-8")
    assert run.returncode == 1 and "is of the kind 'letters'; known kinds: sentencepiece, bytes" in run.stderr
    subprocess.run([*build, *plugins], capture_output=True, check=True)
    show = [PYTHON, str(TOOLS / "inspect_dataset.py"), "--path", str(tmp_path / "o_text_document"), *files, *plugins]
    run = subprocess.run(show, capture_output=True, encoding="utf-8", check=True)
    assert "text: cab a" in run.stdout and "text: bb" in run.stdout


def test_a_line_end_before_the_json_is_none_of_sentencepiece(tmp_path):
    (tmp_path / "bytes.json").write_text('\n{"kind": "bytes"}\n')
    assert open_tokenizer(tmp_path / "bytes.json").kind == "bytes"
