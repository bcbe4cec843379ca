"""Blocks of texts → one array of ids: SentencePiece's own ids, without a Python object a token.

For BPE models the work is done once a word. With `split_by_whitespace` no piece holds U+2581 (the escaped space)
anywhere but at its beginning, so no merge crosses the beginning of a word and the merges of a word do not depend on its
neighbours: the ids of a text are those of its normalised words, one after another. That does not hold for unigram
models (scores are summed in float32 along the whole text, so ties and near-ties fall differently): SentencePiece
encodes those texts itself, and fast.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain, repeat
from typing import Protocol

import numpy as np
import sentencepiece

from megatron_mm.data.tokenizer import Tokenizer

_SPACE = "\u2581"
_MAX_WORDS = 1 << 18
_WORDS_A_CALL = 8
#: Text that `str.split` divides as the usual normalisation rules do (`_splits_plainly`).
_NOT_PLAIN = re.compile(r"[^\t\n\r -~]")


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
    """Encoding by words, each encoded once and then looked up. Use `word_encoder`, which checks that it is exact."""

    def __init__(self, tokenizer: Tokenizer, word_model: bytes, eod: int | None) -> None:
        self._normalize = tokenizer.processor.normalize
        self._plain = _splits_plainly(tokenizer)
        self._encode = sentencepiece.SentencePieceProcessor(model_proto=word_model).encode
        pieces = map(tokenizer.processor.id_to_piece, range(tokenizer.vocab_size))
        self._begins_word = np.array([piece.startswith(_SPACE) for piece in pieces])
        self._eod = eod
        self._reset()

    def _reset(self) -> None:
        """Empties the cache. Keys: a word without its space; for text that begins without one, a space and the text."""
        self._index: dict[str, int] = {}
        self._ids = np.empty(1 << 16, np.int32)
        self._starts = np.empty(1 << 14, np.int64)
        self._sizes = np.empty(1 << 14, np.int64)
        self._used = 0
        if self._eod is not None:
            self._add([_SPACE], np.array([self._eod]), np.array([1]))  # no word has this key

    def _add(self, keys: Sequence[str], ids: np.ndarray, sizes: np.ndarray) -> None:
        assert len(keys) == sizes.size, "pieces that begin with a space do not match the words"
        first, total = len(self._index), ids.size
        while self._used + total > self._ids.size:
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
        while first + sizes.size > self._starts.size:
            self._starts = np.concatenate([self._starts, np.empty_like(self._starts)])
            self._sizes = np.concatenate([self._sizes, np.empty_like(self._sizes)])
        self._ids[self._used : self._used + total] = ids
        self._starts[first : first + sizes.size] = self._used + np.cumsum(sizes) - sizes
        self._sizes[first : first + sizes.size] = sizes
        self._used += total
        self._index.update(zip(keys, range(first, first + len(keys))))

    def _words(self, text: str) -> list[str]:
        """Keys of a text's words."""
        if self._plain and _NOT_PLAIN.search(text) is None:
            return text.split()
        words = self._normalize(text).split(_SPACE)
        if words[0]:
            words[0] = _SPACE + words[0]
        else:
            del words[0]
        return words

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if len(self._index) > _MAX_WORDS:
            self._reset()
        documents = [self._words(text) for text in texts]
        if self._eod is not None:
            for words in documents:
                if words:
                    words.append(_SPACE)
        counts = np.fromiter(map(len, documents), np.int64, len(documents))
        words = list(chain.from_iterable(documents))
        found = np.fromiter(map(self._index.get, words, repeat(-1)), np.int64, len(words))
        missing = np.flatnonzero(found < 0)
        if missing.size:
            keys = list(dict.fromkeys(words[i] for i in missing.tolist()))
            heads = [key for key in keys if key.startswith(_SPACE)]
            if heads:  # only in models without a dummy prefix
                encoded = [self._encode(key[1:]) for key in heads]
                sizes = np.fromiter(map(len, encoded), np.int64, len(encoded))
                self._add(heads, np.fromiter(chain.from_iterable(encoded), np.int32, int(sizes.sum())), sizes)
                keys = [key for key in keys if not key.startswith(_SPACE)]
            # Many new words in one call: the pieces that begin with a space are where they begin.
            for start in range(0, len(keys), _WORDS_A_CALL):
                part = keys[start : start + _WORDS_A_CALL]
                ids = np.array(self._encode(_SPACE + _SPACE.join(part)), dtype=np.int32)
                starts = np.flatnonzero(self._begins_word[ids])
                self._add(part, ids, np.diff(np.append(starts, ids.size)))
            found[missing] = [self._index[words[i]] for i in missing.tolist()]
        sizes = self._sizes[found]
        ends = np.concatenate([[0], np.cumsum(sizes)])
        ids = self._ids[np.repeat(self._starts[found] - ends[:-1], sizes) + np.arange(ends[-1])]
        bounds = ends[np.concatenate([[0], np.cumsum(counts)])]
        return ids, np.diff(bounds).astype(np.int32)


def _splits_plainly(tokenizer: Tokenizer) -> bool:
    """Whether normalising text of printable ASCII, tabs and line ends does nothing but turn runs of white space into
    one escaped space before each word: tried on every pair of such characters.

    No rule of SentencePiece's own (all but "user_defined") looks at more than one ASCII character.
    """
    normalize = tokenizer.processor.normalize
    characters = [chr(code) for code in (9, 10, 13, *range(32, 127))]
    pairs = [a + b for a in characters for b in characters]
    return _rule(tokenizer) in ("nmt_nfkc", "nfkc", "identity") and all(
        normalize(text) == "".join(_SPACE + word for word in text.split()) for text in (*pairs, " a \t\n b\r\n", "  ")
    )


def _rule(tokenizer: Tokenizer) -> str:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(tokenizer.processor.serialized_model_proto())
    return proto.normalizer_spec.name


def word_encoder(tokenizer: Tokenizer, eod: int | None) -> WordEncoder | None:
    """An encoder by words, or None where words are not independent of each other."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(tokenizer.processor.serialized_model_proto())
    trainer = proto.trainer_spec
    independent = (
        trainer.model_type == trainer.BPE
        and trainer.split_by_whitespace
        and not trainer.treat_whitespace_as_suffix
        and proto.normalizer_spec.escape_whitespaces
        # Not merely what the trainer was told: no piece of the vocabulary holds a space beyond its first character.
        and not any(_SPACE in piece.piece[1:] or " " in piece.piece for piece in proto.pieces)
        # Every word then begins with a piece of its own, and a run of unknown characters (one <unk>) ends with it.
        and any(piece.piece == _SPACE and piece.type == piece.NORMAL for piece in proto.pieces)
    )
    if not independent:
        return None
    # Words come normalised: the model that encodes them must leave them as they are.
    proto.normalizer_spec.Clear()
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.escape_whitespaces = False
    return WordEncoder(tokenizer, proto.SerializeToString(), eod)


def block_encoder(tokenizer: Tokenizer, eod: int | None) -> BlockEncoder:
    """The fastest encoder whose ids are SentencePiece's own."""
    return word_encoder(tokenizer, eod) or DirectEncoder(tokenizer, eod)
