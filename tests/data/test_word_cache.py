"""Encoding by words: the ids of SentencePiece for every kind of model, cold and warm, in texts short and long."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from megatron_mm.data.tokens import word_cache, word_vocabulary
from megatron_mm.data.tokens.block_encoder import DirectEncoder
from megatron_mm.data.tokens.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_mm.data.tokens.tokenizer import open_tokenizer
from megatron_mm.data.tokens.word_cache import block_encoder, prepare, word_encoder
from tests.data.real_texts import ODD, real_texts

KINDS = ("bpe", "unigram")


def trained(folder: Path, name: str, **options: object) -> SentencePieceTokenizer:
    """A model of 600 pieces, of SentencePiece's own making."""
    lines = [line for text in real_texts()[len(ODD) :][:60] for line in text.split("\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), vocab_size=600, model_prefix=str(folder / name), minloglevel=2,
        hard_vocab_limit=False, **options,
    )  # fmt: skip
    return open_tokenizer(folder / f"{name}.model", require_media=False)


def changed(model: SentencePieceTokenizer, path: Path, change) -> SentencePieceTokenizer:
    """A model with a change of its description."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.processor.serialized_model_proto())
    change(proto)
    path.write_bytes(proto.SerializeToString())
    return open_tokenizer(path, require_media=False)


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
def model(request, folder) -> SentencePieceTokenizer:
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


@pytest.mark.slow
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


@pytest.mark.parametrize("before, after", [("", "b" * 10), ("a" * 8, "b" * 10), ("a" * 16, ""), ("a" * 24, "")])
def test_long_words_that_are_partly_alike_are_told_apart(folder, before, after):
    """So many that some meet in the table."""
    model = trained(folder, "alike", model_type="bpe")
    text = " ".join(f"{before}{number:06}{after}" for number in range(40000))
    assert word_encoder(model, None)([text])[0].tolist() == model.processor.encode(text)


def test_near_ties_are_decided_by_rounding_as_there(folder):
    """Pieces whose scores differ by as little as the sums are rounded: the same word is divided in different ways."""
    noise = np.random.default_rng(1)

    def nearly_equal(proto):
        for piece in proto.pieces:
            if piece.type == piece.NORMAL:
                piece.score = -2.0 * len(piece.piece) + noise.normal(0, 1e-4)

    model = changed(trained(folder, "plain ties", model_type="unigram"), folder / "ties.model", nearly_equal)
    encoder = word_encoder(model, None)
    long = " ".join(real_texts()[len(ODD) :] * 3)
    for start in range(0, 200, 20):
        ids, _ = encoder([long[start:]])
        assert ids.tolist() == model.processor.encode(long[start:])
    ids, _ = encoder([" ".join(["collection"] * 4000)])
    assert ids.tolist() == model.processor.encode(" ".join(["collection"] * 4000))
    begins = np.flatnonzero([model.processor.id_to_piece(int(i)).startswith("\u2581") for i in ids])
    divided = {tuple(part) for part in np.split(ids, begins[1:])}
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


def unused(proto):
    proto.pieces[300].type = proto.SentencePiece.UNUSED


def positive(proto):
    proto.pieces[300].score = 1.0


def no_boundary(proto):
    next(piece for piece in proto.pieces if piece.piece == "\u2581").piece = "\u2581☃☃"


def one_character(proto):
    proto.pieces[1].piece = "☃"  # <s>


@pytest.mark.parametrize(
    ("kind", "change"),
    [("bpe", unused), ("unigram", positive), *((kind, how) for kind in KINDS for how in (no_boundary, one_character))],
)
def test_models_that_are_not_known_are_left_alone(kind, change, folder):
    model = trained(folder, f"{kind} left", model_type=kind)
    assert word_encoder(model, None) is not None
    assert word_encoder(changed(model, folder / f"{kind} {change.__name__}.model", change), None) is None


SPACES = "9\t20\nA\t20\nD\t20\n"
RULES = {
    "none": "",
    "a pair": "61 62\t63\n",
    "beyond a space": "20 301\tB4\n",
    "up to a space": "301 20\tB4\n",
    "to U+2581": "E9\t2581\n",
}


@pytest.mark.parametrize("name", RULES)
def test_rules_that_join_are_seen(name, folder):
    """Texts are divided before they are normalised only where no rule looks at white space and what is beside it."""
    file = folder / f"{name}.tsv"
    file.write_text(SPACES + RULES[name])
    model = trained(folder, name, model_type="bpe", normalization_rule_tsv=str(file))
    encoder = word_encoder(model, None)
    assert encoder._divides == (name == "none")
    texts = ["ab a\tb ab", "a \u0301b", "a\u0301 b", "café é", "\u2581 a\u2581 b\u2581c"]
    assert encoder(texts)[0].tolist() == list(chain.from_iterable(map(model.processor.encode, texts)))


def test_characters_without_a_piece_of_their_own(folder):
    """They are unknown by themselves, and merge all the same where a piece holds them."""

    def rename(proto):
        for piece in proto.pieces:
            if piece.piece in ("e", "t"):
                piece.piece += "☃☃"

    model = changed(trained(folder, "to be renamed", model_type="bpe"), folder / "renamed.model", rename)
    texts = real_texts()
    ids, _ = word_encoder(model, None)(texts)
    assert ids.tolist() == list(chain.from_iterable(map(model.processor.encode, texts)))
    assert (ids == model.processor.unk_id()).sum() > 100 and model.processor.piece_to_id("he") in ids


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
