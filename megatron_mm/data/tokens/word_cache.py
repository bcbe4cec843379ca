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

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numba.core import event

from megatron_mm.data.tokens import word_kernels as kernels
from megatron_mm.data.tokens.block_encoder import BlockEncoder, DirectEncoder
from megatron_mm.data.tokens.word_kernels import Words
from megatron_mm.data.tokens.word_vocabulary import (
    SPACE,
    is_unigram,
    pieces,
    space_divides,
    word_model,
    words_are_independent,
)

if TYPE_CHECKING:
    from megatron_mm.data.tokens.sentencepiece_tokenizer import SentencePieceTokenizer

#: Words that are kept, and bytes by which they are spelt; then all are forgotten.
_MAX_WORDS = 1 << 19
_MAX_KEYS = 1 << 23
#: Bytes that are encoded at a time.
_BATCH = 1 << 18


class WordEncoder:
    """Encoding by words. Use `word_encoder`, which checks that it is exact."""

    def __init__(self, tokenizer: SentencePieceTokenizer, eod: int | None) -> None:
        self._normalize = tokenizer.processor.normalize
        self._whole = DirectEncoder(tokenizer, eod)
        self._eod = -1 if eod is None else eod
        self._unigram, self._pieces = is_unigram(tokenizer), pieces(tokenizer)
        self._divides = space_divides(tokenizer)
        self._kinds = np.full(256, kernels.OTHER, np.uint8)
        self._kinds[33:127] = kernels.PLAIN
        self._kinds[[9, 10, 13, 32]] = kernels.SPACE
        self._encode_word = word_model(tokenizer).encode  # what the kernels leave
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
            normalised = not self._divides or SPACE in text
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
                ends = (SPACE.encode(),) if normalised else (b" ", b"\n")
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


def word_encoder(tokenizer: SentencePieceTokenizer, eod: int | None) -> WordEncoder | None:
    """An encoder by words, or None where words are not independent of each other."""
    return WordEncoder(tokenizer, eod) if words_are_independent(tokenizer) else None


def block_encoder(tokenizer: SentencePieceTokenizer, eod: int | None) -> BlockEncoder:
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


def prepare(tokenizer: SentencePieceTokenizer) -> None:
    """Compiles what is not yet, and makes a model's tables: worker processes that are forked afterwards find them."""
    with event.install_listener("numba:compile", _SayCompiling()):
        block_encoder(tokenizer, None)(["a"])
