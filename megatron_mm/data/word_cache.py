"""Blocks of texts → one array of ids, exactly SentencePiece's, with every word encoded once.

Where no piece holds U+2581 (the escaped space) but at its beginning, none crosses the beginning of a word:

- The merges of a BPE word do not depend on its neighbours: the ids of a text are those of its words.
- The best path of a unigram model passes through every beginning of a word. In exact arithmetic, what it does in a
  word would not depend on the rest either; SentencePiece adds scores in float32 along the whole text, so where the
  second best path is as near as rounding, the word's path is sought again with the score so far (`word_kernels.py`).

Texts are divided at white space before they are normalised where the model's normalisation allows it, so that a word
with other than plain ASCII characters is normalised once too. Models whose words depend on each other are left to
SentencePiece.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from itertools import chain
from typing import Protocol

import numpy as np
import sentencepiece
from numba import njit
from numba.core import event

from megatron_mm.data import word_kernels as kernels
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.data.word_kernels import Map, Pieces, Trie, Words

_SPACE = "\u2581"
_SPACE_BYTES = _SPACE.encode()
#: Releases of SentencePiece whose arithmetic of unigram models `word_kernels.py` repeats.
_UNIGRAM_RELEASES = ("0.2.3",)
#: Words that are kept, and bytes by which they are spelt; then all are forgotten.
_MAX_WORDS = 1 << 19
_MAX_KEYS = 1 << 23
#: Bytes that are encoded at a time.
_BATCH = 1 << 18


class BlockEncoder(Protocol):
    """Encodes texts; `eod` ends each text that has tokens, unless None."""

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts back to back (int32), and the length of each (int32)."""


class DirectEncoder:
    """SentencePiece's encoding of whole texts."""

    def __init__(self, tokenizer: Tokenizer, eod: int | None) -> None:
        self._encode = tokenizer.processor.encode
        self._as_numpy = hasattr(tokenizer.processor, "encode_as_numpy")  # from sentencepiece 0.2.3
        self._eod = np.array([] if eod is None else [eod], dtype=np.int32)

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if self._as_numpy:
            documents = self._encode(list(texts), return_type="numpy", num_threads=1)
        else:
            documents = [np.array(self._encode(text), dtype=np.int32) for text in texts]
        lengths = np.fromiter(map(len, documents), np.int32, len(documents))
        parts = chain.from_iterable((ids, self._eod) if ids.size else (ids,) for ids in documents)
        lengths += (lengths > 0) * np.int32(self._eod.size)
        return np.concatenate([np.empty(0, np.int32), *parts]).astype(np.int32, copy=False), lengths


class WordEncoder:
    """Encoding by words. Use `word_encoder`, which checks that it is exact."""

    def __init__(self, tokenizer: Tokenizer, eod: int | None) -> None:
        self._normalize = tokenizer.processor.normalize
        self._whole = DirectEncoder(tokenizer, eod)
        self._eod = -1 if eod is None else eod
        model = _model(tokenizer.processor.serialized_model_proto())
        self._unigram = model.trainer_spec.model_type == model.trainer_spec.UNIGRAM
        self._pieces = _pieces(tokenizer.processor.serialized_model_proto())
        self._divides = _space_divides(tokenizer)
        self._kinds = np.full(256, kernels.OTHER, np.uint8)
        self._kinds[33:127] = kernels.PLAIN
        self._kinds[[9, 10, 13, 32]] = kernels.SPACE
        # Words come normalised: the model that encodes the rare ones must leave them as they are.
        model.normalizer_spec.Clear()
        model.normalizer_spec.name = "identity"
        model.normalizer_spec.add_dummy_prefix = False
        model.normalizer_spec.remove_extra_whitespaces = False
        model.normalizer_spec.escape_whitespaces = False
        self._encode_word = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString()).encode
        self._words = Words.empty(_MAX_WORDS + _BATCH, _MAX_KEYS + _BATCH)

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids: list[np.ndarray] = [np.empty(0, np.int32)]
        sizes: list[np.ndarray] = [np.empty(0, np.int64)]
        batch: list[tuple[bytes, bool]] = []
        held = 0

        def end_batch() -> None:
            nonlocal held
            if batch:
                part, lengths, _ = self._encode(batch, np.float32(0), self._eod)
                ids.append(part)
                sizes.append(lengths)
                batch.clear()
                held = 0

        for text in texts:
            normalised = not self._divides or _SPACE in text
            data = (self._normalize(text) if normalised else text).encode()
            if held + len(data) > _BATCH:
                end_batch()
            if len(data) > _BATCH:
                long = self._long(text, data, normalised)
                ids.append(long)
                sizes.append(np.array([long.size]))
            else:
                batch.append((data, normalised))
                held += len(data)
        end_batch()
        return np.concatenate(ids), np.concatenate(sizes).astype(np.int32)

    def _long(self, text: str, data: bytes, normalised: bool) -> np.ndarray:
        """Ids of a text that is longer than a batch, part by part."""
        parts, score, start = [], np.float32(0), 0
        while start < len(data):
            end = len(data)
            if end - start > _BATCH:
                ends = (_SPACE_BYTES,) if normalised else (b" ", b"\n")
                end = max(data.rfind(mark, start + 1, start + _BATCH) for mark in ends)
                if end < 0:  # a word that no batch holds
                    return self._whole([text])[0]
            part, _, score = self._encode([(data[start:end], normalised)], score, -1)
            parts.append(part)
            start = end
        if self._eod >= 0 and any(part.size for part in parts):
            parts.append(np.array([self._eod], np.int32))
        return np.concatenate(parts)

    def _encode(
        self, batch: list[tuple[bytes, bool]], score: np.float32, eod: int
    ) -> tuple[np.ndarray, np.ndarray, np.float32]:
        """Ids and lengths of a batch, and the score of the best path through its last text."""
        if self._words.count > _MAX_WORDS or self._words.used_keys > _MAX_KEYS:
            self._words.clear()
        bounds = np.cumsum([0, *(len(data) for data, _ in batch)])
        room = -(-int(bounds[-1]) // 8) * 8 + kernels.PADDING
        data = np.frombuffer(b"".join(data for data, _ in batch).ljust(room), np.uint8)
        normalised = np.array([normalised for _, normalised in batch])
        self._words = self._words.with_room(4 * data.size)
        first = self._words.count
        found, counts = kernels.scan(data, bounds, self._kinds, normalised, self._words)
        self._add(first)
        return kernels.emit(found, counts, self._words, self._unigram, self._pieces, score, eod)

    def _add(self, first: int) -> None:
        """Ids of the words from `first` on."""
        words = self._words
        unknown = [first + i for i in np.flatnonzero(words.norm_sizes(first) < 0).tolist()]
        norms = [self._normalize(words.key(word).decode()).encode() for word in unknown]
        words = self._words = words.with_room(sum(map(len, norms)))
        for word, norm in zip(unknown, norms):
            words.set_norm(word, norm)
        words = self._words = words.with_room(int(words.norm_sizes(first).sum()))
        for word in kernels.fill(words, first, words.count, self._unigram, self._pieces).tolist():
            words.set_ids(word, self._encode_word(words.norm(word).decode()))


@functools.lru_cache(1)
def _parsed(proto: bytes):
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(proto)
    return model


def _model(proto: bytes):
    """A SentencePiece model's description, to be changed at will."""
    parsed = _parsed(proto)
    return type(parsed).FromString(proto)


@functools.lru_cache(1)  # worker processes that are forked find it made
def _pieces(proto: bytes) -> Pieces:
    """The vocabulary as the kernels want it."""
    model = _parsed(proto)
    normal, user, byte = (getattr(model.SentencePiece, kind) for kind in ("NORMAL", "USER_DEFINED", "BYTE"))
    unigram = model.trainer_spec.model_type == model.trainer_spec.UNIGRAM
    scores = np.array([piece.score for piece in model.pieces], np.float32)
    usable = {piece.piece: i for i, piece in enumerate(model.pieces) if piece.type in (normal, user)}
    unknown = next(i for i, piece in enumerate(model.pieces) if piece.type == model.SentencePiece.UNKNOWN)
    in_trie = usable
    if unigram:
        for i, piece in enumerate(model.pieces):
            if piece.type == user:
                scores[i] = np.float32(0.1 * (len(piece.piece.encode()) - 1))
    else:
        in_trie = {text: i for text, i in usable.items() if model.pieces[i].type == user}
    characters, pairs = ({}, {}) if unigram else _merges(usable, len(model.pieces))
    spelling = [i for i, piece in enumerate(model.pieces) if piece.type == byte]
    if spelling:
        spelling.sort(key=lambda i: int(model.pieces[i].piece[3:-1], 16))  # <0x0A>
    return Pieces(
        scores=scores,
        trie=_trie(in_trie),
        characters=_map(characters),
        pairs=_map(pairs),
        bytes=np.array(spelling if model.trainer_spec.byte_fallback else [], np.int32),
        unknown=unknown,
        unknown_score=np.float32(min(scores[i] for i in usable.values() if model.pieces[i].type == normal) - 10),
    )


def _map(entries: dict[int, int]) -> Map:
    keys = np.fromiter(entries.keys(), np.int64, len(entries))
    return Map(*kernels.make_map(keys, np.fromiter(entries.values(), np.int32, len(entries))))


def _trie(pieces: dict[str, int]) -> Trie:
    edges: dict[int, int] = {}  # node · 256 + byte → node
    ends = [-1]
    for text, piece in pieces.items():
        node = 0
        for byte in text.encode():
            child = edges.setdefault(node * 256 + byte, len(ends))
            if child == len(ends):
                ends.append(-1)
            node = child
        ends[node] = piece
    keys = np.fromiter(edges.keys(), np.int64, len(edges))
    children = np.fromiter(edges.values(), np.int64, len(edges))
    order = np.argsort(keys)
    return Trie(*kernels.make_trie(keys[order], children[order], np.array(ends, np.int32)))


def _merges(pieces: dict[str, int], size: int) -> tuple[dict[int, int], dict[int, int]]:
    """Symbols of single characters, and the piece that each pair of symbols makes."""
    symbols = dict(pieces)
    for text in pieces:
        for character in text:
            if character not in symbols:  # unknown by itself, but part of a piece
                symbols[character] = size + len(symbols) - len(pieces)
    pairs = {}
    for text, piece in pieces.items():
        for cut in range(1, len(text)):
            left, right = symbols.get(text[:cut]), symbols.get(text[cut:])
            if left is not None and right is not None:
                pairs[(left << 32) + right] = piece
    return {ord(text): symbol for text, symbol in symbols.items() if len(text) == 1}, pairs


@njit(cache=True)
def _has_joining_rule(units):
    """Whether a rule of normalisation looks at several ASCII characters, or at white space and what stands beside it.

    Args:
        units: uint32, the rules' double-array trie (darts-clone's).
    """
    stack = [(np.int64(0), True, False)]  # a node, whether its path is ASCII, and whether there is white space in it
    while stack:
        node, ascii, spaced = stack.pop()
        unit = np.int64(units[node])
        base = node ^ ((unit >> 10) << ((unit & 512) >> 6))
        for byte in range(1, 256):
            child = base ^ byte
            if child >= units.size or np.int64(units[child]) & 0x800000FF != byte:
                continue
            space = byte == 32 or 9 <= byte <= 13
            if node != 0 and (space or spaced or (ascii and byte < 128)):
                return True
            stack.append((child, ascii and byte < 128, spaced or space))
    return False


@functools.lru_cache(1)
def _rules_divide(charsmap: bytes) -> bool:
    """Whether rules of normalisation see neither two plain characters nor across white space, and write no U+2581."""
    if not charsmap:
        return True
    size = int.from_bytes(charsmap[:4], "little")
    units = np.frombuffer(charsmap, np.uint32, size // 4, offset=4)
    return _SPACE_BYTES not in charsmap[4 + size :] and not _has_joining_rule(units)


def _space_divides(tokenizer: Tokenizer) -> bool:
    """Whether a text may be divided at tabs, line ends and spaces, and each word normalised by itself: one of plain
    ASCII by an escaped space before it.
    """
    model = _parsed(tokenizer.processor.serialized_model_proto())
    spec, normalize = model.normalizer_spec, tokenizer.processor.normalize
    user = (piece.piece for piece in model.pieces if piece.type == model.SentencePiece.USER_DEFINED)
    return (
        spec.add_dummy_prefix
        and spec.remove_extra_whitespaces
        and not any(character.isspace() for text in user for character in text)
        and _rules_divide(spec.precompiled_charsmap)
        and all(normalize(chr(code)) == _SPACE + chr(code) for code in range(33, 127))
        and all(normalize(f"a{space}b") == f"{_SPACE}a{_SPACE}b" for space in "\t\n\r ")
    )


def word_encoder(tokenizer: Tokenizer, eod: int | None) -> WordEncoder | None:
    """An encoder by words, or None where words are not independent of each other."""
    model = _parsed(tokenizer.processor.serialized_model_proto())
    trainer, kinds = model.trainer_spec, model.SentencePiece
    usable = [piece for piece in model.pieces if piece.type in (kinds.NORMAL, kinds.USER_DEFINED, kinds.UNUSED)]
    known = {
        trainer.BPE: all(piece.type != kinds.UNUSED for piece in model.pieces),
        trainer.UNIGRAM: sentencepiece.__version__ in _UNIGRAM_RELEASES
        and all(piece.score <= 0 for piece in model.pieces),
    }
    independent = (
        known.get(trainer.model_type, False)
        and not trainer.treat_whitespace_as_suffix
        and model.normalizer_spec.escape_whitespaces
        # Not merely what the trainer was told: no piece of the vocabulary holds a space beyond its first character.
        and not any(_SPACE in piece.piece[1:] or " " in piece.piece for piece in usable)
        # Every word then begins with a piece of its own, and a run of unknown characters (one <unk>) ends with it.
        and any(piece.piece == _SPACE and piece.type == kinds.NORMAL for piece in usable)
        and all(len(piece.piece) > 1 for piece in model.pieces if piece.type not in (kinds.NORMAL, kinds.USER_DEFINED))
    )
    return WordEncoder(tokenizer, eod) if independent else None


def block_encoder(tokenizer: Tokenizer, eod: int | None) -> BlockEncoder:
    """The fastest encoder whose ids are SentencePiece's own."""
    return word_encoder(tokenizer, eod) or DirectEncoder(tokenizer, eod)


class _SayCompiling(event.Listener):
    """Says so, once, when numba compiles something that it did not keep from an earlier run."""

    def __init__(self) -> None:
        self.said = False

    def on_start(self, event: event.Event) -> None:
        if not self.said:
            print("compiling the text encoder (once; it is kept for later runs)", file=sys.stderr, flush=True)
        self.said = True

    def on_end(self, event: event.Event) -> None:
        pass


def prepare(tokenizer: Tokenizer) -> None:
    """Compiles what is not yet, and makes a model's tables: worker processes that are forked afterwards find them."""
    with event.install_listener("numba:compile", _SayCompiling()):
        block_encoder(tokenizer, None)(["a"])
