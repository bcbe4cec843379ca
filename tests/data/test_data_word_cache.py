"""Encoding by words: the ids of SentencePiece for every kind of model, cold and warm, in texts short and long."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from megatron_mm.data import word_cache, word_vocabulary
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.data.word_cache import DirectEncoder, block_encoder, prepare, word_encoder
from tests.data.real_texts import ODD, real_texts

KINDS = ("bpe", "unigram")


def trained(folder: Path, name: str, **options: object) -> Tokenizer:
    """A model of 600 pieces, of SentencePiece's own making."""
    lines = [line for text in real_texts()[len(ODD) :][:60] for line in text.split("\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), vocab_size=600, model_prefix=str(folder / name), minloglevel=2,
        hard_vocab_limit=False, **options,
    )  # fmt: skip
    return Tokenizer(folder / f"{name}.model", require_media=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


VARIANTS = {
    "plain": {},
    "media": {"user_defined_symbols": ["<image>", "aa", "é"]},
    "no prefix": {"add_dummy_prefix": False},
    "every space": {"remove_extra_whitespaces": False},
    "bytes": {"normalization_rule_name": "identity", "byte_fallback": True},
    "lower case": {"normalization_rule_name": "nmt_nfkc_cf"},
}


@pytest.fixture(scope="module", params=[(kind, name) for kind in KINDS for name in VARIANTS], ids="-".join)
def model(request, folder) -> Tokenizer:
    kind, name = request.param
    return trained(folder, f"{kind} {name}", model_type=kind, **VARIANTS[name])


@pytest.mark.parametrize("eod", [None, 3])
def test_ids_are_sentencepieces(model, eod):
    encoder = word_encoder(model, eod)
    assert encoder is not None
    texts = real_texts()
    expected = [model.processor.encode(text) for text in texts]
    expected = [[*ids, eod] if ids and eod is not None else ids for ids in expected]
    for order in (1, -1, 1):  # cold, warm, another order
        ids, lengths = encoder(texts[::order])
        for text, want, got in zip(texts[::order], expected[::order], np.split(ids, np.cumsum(lengths)[:-1])):
            assert got.tolist() == want, text[:80]
        assert lengths.sum() == ids.size


def test_long_texts_are_encoded_part_by_part(model, monkeypatch):
    """Scores of unigram models run on from part to part, past where SentencePiece takes them back to zero."""
    monkeypatch.setattr(word_cache, "_BATCH", 1 << 12)
    long = " ".join(text for text in real_texts() * 8 if text not in ODD)
    broken = long[:9000] + "x" * 5000 + long[:9000]  # a word that no part holds
    accented = long.replace("e", "é").replace("i", "\u0456")
    texts = ["short", long, "", broken, accented, "short again"]
    ids, lengths = word_encoder(model, 3)(texts)
    expected = [[*ids, 3] if ids else [] for ids in map(model.processor.encode, texts)]
    assert lengths.tolist() == [len(want) for want in expected]
    assert ids.tolist() == list(chain.from_iterable(expected))


def test_long_words_that_begin_alike_are_told_apart(folder):
    """So many that some meet in the table."""
    model = trained(folder, "alike", model_type="bpe")
    text = " ".join(f"{'a' * 24}{number:06}" for number in range(40000))
    assert word_encoder(model, None)([text])[0].tolist() == model.processor.encode(text)


def test_near_ties_are_decided_by_rounding_as_there(folder):
    """Pieces whose scores differ by as little as the sums are rounded: the same word is divided in different ways."""
    from sentencepiece import sentencepiece_model_pb2

    plain = trained(folder, "to be changed", model_type="unigram")
    proto = sentencepiece_model_pb2.ModelProto.FromString(plain.processor.serialized_model_proto())
    noise = np.random.default_rng(1).normal(0, 1e-4, len(proto.pieces))
    for piece, change in zip(proto.pieces, noise):
        if piece.type == piece.NORMAL:
            piece.score = -2.0 * len(piece.piece) + change  # all ways of dividing a word are nearly equal
    path = folder / "ties.model"
    path.write_bytes(proto.SerializeToString())
    model = Tokenizer(path, require_media=False)
    encoder = word_encoder(model, None)
    long = " ".join(real_texts()[len(ODD) :] * 3)
    divided = set()
    for start in range(0, 200, 20):
        ids, _ = encoder([long[start:]])
        assert ids.tolist() == model.processor.encode(long[start:])
    for text in (" ".join(["collection"] * 4000),):
        ids = np.array(model.processor.encode(text))
        bounds = np.flatnonzero([model.processor.id_to_piece(int(i)).startswith("\u2581") for i in ids])
        divided |= {tuple(part) for part in np.split(ids, bounds[1:])}
        assert encoder([text])[0].tolist() == ids.tolist()
    assert len(divided) > 1, "rounding never mattered: the test shows nothing"


def test_only_where_words_are_independent(folder, monkeypatch):
    """Pieces across spaces, spaces as suffixes, and unknown releases' arithmetic are left to SentencePiece."""
    assert word_encoder(trained(folder, "across", model_type="bpe", split_by_whitespace=False), None) is None
    for kind in KINDS:
        assert word_encoder(trained(folder, "s", model_type=kind, treat_whitespace_as_suffix=True), None) is None
    assert word_encoder(trained(folder, "characters", model_type="char"), None) is None
    unigram = trained(folder, "unigram", model_type="unigram")
    monkeypatch.setattr(sentencepiece, "__version__", "9.0")
    assert isinstance(block_encoder(unigram, None), DirectEncoder)


def test_rules_that_join_are_seen(folder):
    """Texts are divided before they are normalised only where no rule looks at white space and what is beside it."""
    rules = {"none": "", "a pair": "61 62\t63\n", "beyond a space": "20 301\tB4\n", "to U+2581": "E9\t2581\n"}
    for name, lines in rules.items():
        options = {}
        if lines:
            file = folder / f"{name}.tsv"
            file.write_text(lines)
            options["normalization_rule_tsv"] = str(file)
        model = trained(folder, name, model_type="bpe", **options)
        encoder = word_encoder(model, None)
        assert encoder._divides == (name == "none"), name
        texts = ["ab a b ab", "a \u0301b", "café é"]
        assert encoder(texts)[0].tolist() == list(chain.from_iterable(map(model.processor.encode, texts))), name


@pytest.mark.parametrize("limit", ["_MAX_WORDS", "_MAX_KEYS"])
def test_the_table_is_bounded(model, monkeypatch, limit):
    monkeypatch.setattr(word_cache, limit, 200)
    encoder, most = word_encoder(model, 3), 0
    for text in real_texts():
        ids, _ = encoder([text])
        assert ids.tolist() == [*model.encode(text), 3][: len(ids)]
        most = max(most, encoder._words.count)
    assert most < 200 + 1000


def test_a_trie_has_its_pieces_and_no_others():
    generator = np.random.default_rng(0)
    pieces = {bytes(generator.integers(1, 255, generator.integers(1, 9))).decode("latin-1") for _ in range(3000)}
    numbers = {piece: number for number, piece in enumerate(sorted(pieces))}
    trie = word_vocabulary._trie(numbers)

    def find(text: str) -> int:
        node = 0
        for byte in text.encode():
            child = int(trie.bases[node]) ^ byte
            if trie.parents[child] != node:
                return -1
            node = child
        return int(trie.ends[node])

    assert all(find(piece) == number for piece, number in numbers.items())
    others = {piece[:-1] for piece in pieces} | {piece + "a" for piece in pieces} | {"zzzz", "\x01"}
    assert all(find(other) == -1 for other in others - pieces if other)


def test_nothing_is_compiled_twice(folder, capsys):
    model = trained(folder, "said", model_type="unigram")
    prepare(model)
    capsys.readouterr()
    prepare(model)
    assert capsys.readouterr().err == ""
