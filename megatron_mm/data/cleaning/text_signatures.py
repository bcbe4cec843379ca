"""Signatures by which equal and nearly equal texts are found: an exact hash, and MinHash of word shingles.

MinHash (Broder, "On the resemblance and containment of documents", 1997): the smallest value of a random permutation
over a set agrees between two sets with the probability of their Jaccard similarity s, so the share of agreeing values
estimates s with a standard deviation of √(s(1−s)/PERMUTATIONS), 0.035 at 0.8. Bands of `rows` values each agree whole
with probability s^rows; of `bands` bands at least one does with probability 1 − (1 − s^rows)^bands (Leskovec,
Rajaraman, Ullman, "Mining of Massive Datasets", 3.4).

Everything here is a fixed function of the text: no seeds of the process, no order of words in memory.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from megatron_mm.data.reading.order import mixed

#: Values of a signature; 4 bytes each.
PERMUTATIONS = 128
_SEED = 2718281828
#: Most words and bytes of texts that are hashed at once, which bounds memory to some 100 MB.
_SEGMENT_WORDS, _BATCH_BYTES = 1 << 17, 1 << 20
# Scripts written without spaces between words: there a character counts as a word.
_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f])"
)
_NOT_WORD = re.compile(r"\W+")
_ASCII_WORDS = bytes(byte if chr(byte).isalnum() or byte == 95 else 32 for byte in bytes(range(128)).lower()).ljust(
    256, b" "
)


def normalised(text: str) -> str:
    """NFKC, lower case, white space collapsed."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.lower().split())


def exact_hash(text: str, media: Iterable[bytes] = ()) -> bytes:
    """128-bit hash of a text and of media as they are stored."""
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for data in media:
        digest.update(b"\x00" + hashlib.blake2b(data, digest_size=16).digest())
    return digest.digest()


def words_of(text: str) -> list[bytes]:
    """Lower-case words without punctuation, for shingles."""
    if text.isascii():
        return text.encode().translate(_ASCII_WORDS).split()
    text = _UNSPACED.sub(r" \1 ", unicodedata.normalize("NFKC", text).lower())
    return _NOT_WORD.sub(" ", text).encode().split()


def _random(count: int, stream: int) -> np.ndarray:
    """Fixed random 64-bit numbers (PCG64 by name: its stream is the same in every release of numpy)."""
    return np.random.PCG64([_SEED, stream]).random_raw(count)


_BYTE_VALUES = _random(256, 0)
# ≡ 3 mod 8: powers differ in their low bits for as long as an odd number's can (order 2^62).
_BASE = int(_random(1, 1)[0]) & ~7 | 3
_A = _random(PERMUTATIONS, 2).astype(np.uint32) | np.uint32(1)
_B = _random(PERMUTATIONS, 3).astype(np.uint32)


def _powers(base: int, count: int) -> np.ndarray:
    powers = np.full(count, base % 2**64, dtype=np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


class _Powers:
    """base^k and base^−k mod 2^64, as many as were needed so far."""

    forward = backward = np.empty(0, dtype=np.uint64)

    @classmethod
    def upto(cls, count: int) -> tuple[np.ndarray, np.ndarray]:
        if count > cls.forward.size:
            cls.forward = _powers(_BASE, count)
            cls.backward = _powers(pow(_BASE, -1, 2**64), count)
        return cls.forward, cls.backward


def shingle_hashes(texts: Sequence[list[bytes]], words: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all runs of `words` words; a shorter text is one run.

    A run's hash is polynomial in its bytes, so one cumulative sum over all texts gives every run's as a difference.

    Args:
        texts: words of each text, at least one.

    Returns:
        (hashes, [shingles] u32; where each text begins in them, [texts]).
    """
    counts = np.array([len(text) for text in texts])
    data = np.frombuffer(b" ".join(map(b" ".join, texts)), dtype=np.uint8)
    forward, backward = _Powers.upto(data.size + 1)
    sums = np.zeros(data.size + 1, dtype=np.uint64)
    np.cumsum(_BYTE_VALUES[data] * forward[: data.size], dtype=np.uint64, out=sums[1:])
    spaces = np.flatnonzero(data == 32)
    starts, ends = np.append(0, spaces + 1), np.append(spaces, data.size)
    shingles = np.maximum(counts - words + 1, 1)
    first_shingle = np.cumsum(shingles) - shingles
    first_word = np.cumsum(counts) - counts
    begin = np.arange(int(shingles.sum())) + np.repeat(first_word - first_shingle, shingles)
    end = begin + np.repeat(np.minimum(counts, words) - 1, shingles)
    begin, end = starts[begin], ends[end]
    hashes = mixed((sums[end] - sums[begin]) * backward[begin])
    return (hashes >> np.uint64(32)).astype(np.uint32), first_shingle


def _segments(texts: Iterable[list[bytes]], words: int) -> Iterator[tuple[int, list[bytes]]]:
    """Pieces of texts, with as much overlap as keeps every shingle in one."""
    for number, text in enumerate(texts):
        for begin in range(0, max(1, len(text) - words + 1), _SEGMENT_WORDS):
            yield number, text[begin : begin + _SEGMENT_WORDS + words - 1]


def minhashes(texts: Sequence[list[bytes]], words: int) -> np.ndarray:
    """MinHash signatures.

    Args:
        texts: words of each text (`words_of`), at least one.
        words: of a shingle.

    Returns:
        [texts, PERMUTATIONS] u32; the permutations are x → ax + b mod 2^32 of the shingles' hashes x.
    """
    signatures = np.full((len(texts), PERMUTATIONS), 0xFFFFFFFF, dtype=np.uint32)
    batch: list[tuple[int, list[bytes]]] = []
    size = 0
    for number, text in _segments(texts, words):
        batch.append((number, text))
        size += sum(map(len, text)) + len(text)
        if size >= _BATCH_BYTES:
            _take_smallest(signatures, batch, words)
            batch, size = [], 0
    if batch:
        _take_smallest(signatures, batch, words)
    return signatures


def _take_smallest(signatures: np.ndarray, batch: list[tuple[int, list[bytes]]], words: int) -> None:
    numbers = [number for number, _ in batch]
    hashes, firsts = shingle_hashes([text for _, text in batch], words)
    smallest = np.empty((PERMUTATIONS, len(batch)), dtype=np.uint32)
    values = np.empty_like(hashes)
    for permutation, (a, b) in enumerate(zip(_A, _B)):
        np.multiply(hashes, a, out=values)
        np.add(values, b, out=values)
        np.minimum.reduceat(values, firsts, out=smallest[permutation])
    np.minimum.at(signatures, numbers, smallest.T)


class Bands(NamedTuple):
    """How signatures are cut: texts with an equal band are compared."""

    bands: int
    rows: int

    def recall(self, similarity: float) -> float:
        """Probability that two texts of this Jaccard similarity are compared: 1 − (1 − s^rows)^bands."""
        return 1.0 - (1.0 - similarity**self.rows) ** self.bands


def choose_bands(threshold: float, recall: float = 0.98) -> Bands:
    """The longest bands (fewest needless comparisons) by which texts at the threshold meet with this probability."""
    cuts = [Bands(PERMUTATIONS // rows, rows) for rows in range(PERMUTATIONS, 0, -1)]
    return next((cut for cut in cuts if cut.recall(threshold) >= recall), cuts[-1])


def band_hashes(signatures: np.ndarray, cut: Bands) -> np.ndarray:
    """Hash of each band, [bands, texts] u64."""
    out = np.empty((cut.bands, len(signatures)), dtype=np.uint64)
    for band in range(cut.bands):
        value = np.full(len(signatures), band + 1, dtype=np.uint64)
        for column in signatures[:, band * cut.rows : (band + 1) * cut.rows].T:
            value = mixed(value * np.uint64(_BASE) + column)
        out[band] = value
    return out


def jaccard(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Estimated similarity of pairs of signatures, [n] f4."""
    return (first == second).mean(axis=1, dtype=np.float32)
