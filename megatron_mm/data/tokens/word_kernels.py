"""Machine code of the text builder: bytes of texts → words → ids, with every word encoded once.

What the functions do is SentencePiece's encoding of a word (its bpe_model.cc and unigram_model.cc, release 0.2.3).
`word_vocabulary.py` says when words may be encoded one by one, and makes the vocabulary's tables; `word_cache.py` feeds
texts in and handles what is rare.

Words are kept in a table (`Words`) under the bytes by which a text spells them. A word has normalised bytes, which
begin with the escaped space, and ids.

Compiled by numba when it first runs, and kept beside this file for later runs. One file, because numba compiles anew
what it kept only where the file itself has changed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

#: Columns of `Words.records`: the first bytes of the key, its size and where it begins in `Words.keys`; normalised
#: bytes and ids (begin · 2²⁴ + size, or -1); and the largest score of the words before with which the ids hold, or -1.
_KEY0, _KEY1, _KEY2, _KEY_SIZE, _KEY, _NORM, _IDS, _LIMIT = range(8)
_INLINE = 24
_LOW = (1 << 24) - 1
#: `Words.used`: what is in use of the arrays.
_USED_WORDS, _USED_KEYS, _USED_NORMS, _USED_IDS = range(4)
#: What `scan` makes of a byte.
OTHER, PLAIN, SPACE = range(3)
#: What a word of a normalised text is.
WHOLE = 3
#: Words that are looked up at a time, and columns of what is held of each: where it begins in the texts, its size, its
#: slot, its first bytes, and of which kind it is.
_AHEAD = 64
_BEGIN, _SIZE, _SLOT, _FIRST, _SECOND, _THIRD, _KIND = range(7)
#: Bytes behind the texts that `scan` may read.
PADDING = 32
#: BPE words of more characters are SentencePiece's; unigram words of more bytes are encoded each time they come.
_MOST_SYMBOLS = 64
_MOST_BYTES = 256
#: Beyond it, SentencePiece subtracts the score of the best path so far from all.
_RESET = 100000.0


class Words(NamedTuple):
    """The words seen so far."""

    slots: np.ndarray
    """int32, open addressing by hash: a word, or -1."""
    records: np.ndarray
    """int64 [words, 8], a cache line each."""
    keys: np.ndarray
    norms: np.ndarray
    ids: np.ndarray
    used: np.ndarray
    """int64: words, and elements of keys, norms and ids."""

    @classmethod
    def empty(cls, words: int, size: int) -> Words:
        """Room for a number of words, and for `size` bytes of keys."""
        lines = np.empty(words * 8 + 8, np.int64)
        first = -lines.ctypes.data % 64 // 8
        return cls(
            np.full(1 << (2 * words - 1).bit_length(), -1, np.int32),
            lines[first : first + words * 8].reshape(words, 8),
            np.empty(size, np.uint8),
            np.empty(size, np.uint8),
            np.empty(size, np.int32),
            np.zeros(4, np.int64),
        )

    def clear(self) -> None:
        """Forgets all words."""
        self.slots.fill(-1)
        self.used.fill(0)

    @property
    def count(self) -> int:
        """Words in the table."""
        return int(self.used[_USED_WORDS])

    @property
    def used_keys(self) -> int:
        """Bytes of their keys."""
        return int(self.used[_USED_KEYS])

    def with_room(self, size: int) -> Words:
        """The table with room for `size` more normalised bytes, and as many ids."""
        norms, ids = self.norms, self.ids
        while norms.size < self.used[_USED_NORMS] + size or ids.size < self.used[_USED_IDS] + size:
            norms = np.concatenate([norms, np.empty_like(norms)])
            ids = np.concatenate([ids, np.empty_like(ids)])
        return self._replace(norms=norms, ids=ids)

    def key(self, word: int) -> bytes:
        """The bytes by which texts spell a word."""
        start, size = self.records[word, _KEY], self.records[word, _KEY_SIZE]
        return self.keys[start : start + size].tobytes()

    def norm_sizes(self, first: int) -> np.ndarray:
        """Normalised bytes of the words from `first` on; -1 where they are not there yet."""
        norms = self.records[first : self.count, _NORM]
        return np.where(norms < 0, -1, norms & _LOW)

    def norm(self, word: int) -> bytes:
        """Normalised bytes of a word."""
        start, size = divmod(int(self.records[word, _NORM]), _LOW + 1)
        return self.norms[start : start + size].tobytes()

    def set_norm(self, word: int, norm: bytes) -> None:
        """Gives a word its normalised bytes."""
        start = int(self.used[_USED_NORMS])
        self.norms[start : start + len(norm)] = np.frombuffer(norm, np.uint8)
        self.records[word, _NORM] = (start << 24) + len(norm)
        self.used[_USED_NORMS] += len(norm)

    def set_ids(self, word: int, ids: list[int]) -> None:
        """Gives a word its ids."""
        start = int(self.used[_USED_IDS])
        self.ids[start : start + len(ids)] = ids
        self.records[word, _IDS] = (start << 24) + len(ids)
        self.used[_USED_IDS] += len(ids)


class Map(NamedTuple):
    """int64 → int32, open addressing; -1 is no key and no value."""

    keys: np.ndarray
    values: np.ndarray


class Trie(NamedTuple):
    """Double array: the child of node n by byte b is n' = bases[n] ^ b where parents[n'] is n. The root is 0."""

    bases: np.ndarray
    parents: np.ndarray
    ends: np.ndarray
    """The piece that ends at a node, or -1."""


class Pieces(NamedTuple):
    """A model's vocabulary."""

    scores: np.ndarray
    """float32 by id; of user-defined pieces of unigram models, what they count."""
    trie: Trie
    """Pieces of a unigram model; user-defined ones of a BPE model."""
    characters: Map
    """BPE: code point → symbol. A symbol is a piece, or from `scores.size` on a character without one."""
    pairs: Map
    """BPE: left symbol · 2³² + right symbol → the piece that they make."""
    bytes: np.ndarray
    """int32 [256] ids of bytes that spell unknown characters; empty where those are one unknown piece."""
    unknown: int
    unknown_score: np.float32


@njit(cache=True, inline="always")
def _slot(key, size):
    return ((key * -7046029254386353131) >> 24) & (size - 1)


@njit(cache=True)
def make_map(keys, values):
    """Keys and values of a Map; of equal keys the last holds."""
    size = 16
    while size < 2 * keys.size:
        size *= 2
    at, of = np.full(size, -1, np.int64), np.full(size, -1, np.int32)
    for i in range(keys.size):
        slot = _slot(keys[i], size)
        while at[slot] != -1 and at[slot] != keys[i]:
            slot = (slot + 1) & (size - 1)
        at[slot], of[slot] = keys[i], values[i]
    return at, of


@njit(cache=True, inline="always")
def _get(table, key):
    slot = _slot(key, table.keys.size)
    while table.keys[slot] != -1:
        if table.keys[slot] == key:
            return table.values[slot]
        slot = (slot + 1) & (table.keys.size - 1)
    return np.int32(-1)


@njit(cache=True, inline="always")
def _has_escape(data, i, end):
    return i + 2 < end and data[i] == 0xE2 and data[i + 1] == 0x96 and data[i + 2] == 0x81


@njit(cache=True)
def _word_end(norms, start, stop):
    """Where the word that begins at `start` ends in normalised bytes."""
    edge = start + 1
    while edge < stop and not _has_escape(norms, edge, stop):
        edge += 1
    return edge


@njit(cache=True, inline="always")
def _eight(lines, i, size):
    """Up to eight bytes from position i on, as a number; `lines` are the bytes eight at a time."""
    at, shift = i >> 3, (i & 7) * 8
    value = np.int64(lines[at] >> np.uint64(shift))
    if shift:
        value |= np.int64(lines[at + 1] << np.uint64(64 - shift))
    if size < 8:
        value &= (np.int64(1) << (size * 8)) - 1
    return value


@njit(cache=True)
def _look_up(ahead, data, words, found):
    """Words of the rows of `ahead`, into `found`; new ones are added.

    Rows are first looked up side by side, so that the processor waits for many places of the table at once: most of
    the time of `scan` would else be waiting for one after the other.
    """
    slots, records, keys, norms, _, used = words
    last = slots.size - 1
    for j in range(found.size):
        found[j] = slots[ahead[j, _SLOT]]
    hits = np.empty(found.size, np.bool_)
    for j in range(found.size):
        word = max(found[j], 0)
        hits[j] = (
            (found[j] >= 0)
            & (ahead[j, _SIZE] <= _INLINE)
            & (records[word, _KEY_SIZE] == ahead[j, _SIZE])
            & (records[word, _KEY0] == ahead[j, _FIRST])
            & (records[word, _KEY1] == ahead[j, _SECOND])
            & (records[word, _KEY2] == ahead[j, _THIRD])
        )
    for j in range(found.size):
        if hits[j]:
            continue
        begin, size, slot, kind = ahead[j, _BEGIN], ahead[j, _SIZE], ahead[j, _SLOT], ahead[j, _KIND]
        first, second, third = ahead[j, _FIRST], ahead[j, _SECOND], ahead[j, _THIRD]
        word = np.int32(-1)
        while slots[slot] >= 0:
            word = slots[slot]
            if (
                records[word, _KEY0] == first
                and records[word, _KEY1] == second
                and records[word, _KEY2] == third
                and records[word, _KEY_SIZE] == size
            ):
                at = _INLINE
                while at < size and keys[records[word, _KEY] + at] == data[begin + at]:
                    at += 1
                if at >= size:
                    break
            slot = (slot + 1) & last
        if slots[slot] < 0:
            word, key = np.int32(used[_USED_WORDS]), used[_USED_KEYS]
            slots[slot] = word
            keys[key : key + size] = data[begin : begin + size]
            used[_USED_WORDS] += 1
            used[_USED_KEYS] += size
            records[word, _KEY0], records[word, _KEY1], records[word, _KEY2] = first, second, third
            records[word, _KEY_SIZE], records[word, _KEY] = size, key
            records[word, _NORM] = records[word, _IDS] = -1
            if kind != OTHER:
                at = start = used[_USED_NORMS]
                if kind == PLAIN:
                    norms[at], norms[at + 1], norms[at + 2] = 0xE2, 0x96, 0x81
                    at += 3
                norms[at : at + size] = data[begin : begin + size]
                used[_USED_NORMS] = at + size
                records[word, _NORM] = (start << 24) + (at + size - start)
        found[j] = word


@njit(cache=True)
def scan(data, bounds, kinds, normalised, words):
    """Words of texts, as they stand in them.

    Args:
        data: uint8, texts back to back and PADDING bytes, a multiple of eight in all.
        bounds: int64 [texts + 1].
        kinds: uint8 [256], OTHER, PLAIN or SPACE: words are divided by space, and normal if of plain bytes alone.
        normalised: bool of each text: it is normalised, and an escaped space begins each word.

    Returns:
        Words, int32, and the number of each text's, int64 [texts].
    """
    found = np.empty(data.size // 2 + bounds.size, np.int32)
    counts = np.zeros(bounds.size - 1, np.int64)
    lines = data.view(np.uint64)
    last = words.slots.size - 1
    ahead, held = np.empty((_AHEAD, 8), np.int64), 0
    total = 0
    for text in range(bounds.size - 1):
        i, end, before, whole = bounds[text], bounds[text + 1], total + held, normalised[text]
        while True:
            while i < end and not whole and kinds[data[i]] == SPACE:
                i += 1
            if i >= end:
                break
            begin, plain = i, True
            if whole:
                i = _word_end(data, begin, end)
            else:
                while i < end:
                    kind = kinds[data[i]]
                    if kind != PLAIN:
                        if kind == SPACE:
                            break
                        plain = False
                    i += 1
            size = i - begin
            first = _eight(lines, begin, size)
            second = _eight(lines, begin + 8, size - 8) if size > 8 else np.int64(0)
            third = _eight(lines, begin + 16, size - 16) if size > 16 else np.int64(0)
            hashed = (first ^ size) * -7046029254386353131
            if size > 8:
                hashed = (hashed ^ (hashed >> 32) ^ second) * -4417276706812531889
                hashed = (hashed ^ (hashed >> 32) ^ third) * -7046029254386353131
                for at in range(begin + _INLINE, i):
                    hashed = (hashed ^ np.int64(data[at])) * 1099511628211
            row = ahead[held]
            row[_BEGIN], row[_SIZE], row[_SLOT] = begin, size, (hashed ^ (hashed >> 29)) >> 8 & last
            row[_FIRST], row[_SECOND], row[_THIRD] = first, second, third
            row[_KIND] = WHOLE if whole else PLAIN if plain else OTHER
            held += 1
            if held == _AHEAD:
                _look_up(ahead, data, words, found[total : total + held])
                total += held
                held = 0
        counts[text] = total + held - before
    _look_up(ahead, data, words, found[total : total + held])
    return found[: total + held], counts


@njit(cache=True, inline="always")
def _character_size(first):
    return 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4


@njit(cache=True)
def _code_point(data, i, size):
    if size == 1:
        return np.int64(data[i])
    value = np.int64(data[i]) & (0x7F >> size)
    for j in range(1, size):
        value = (value << 6) | (np.int64(data[i + j]) & 0x3F)
    return value


@njit(cache=True, inline="always")
def _child(trie, node, byte):
    """The child of a node, or -1."""
    child = np.int64(trie.bases[node]) ^ np.int64(byte)
    return child if trie.parents[child] == node else np.int64(-1)


@njit(cache=True)
def _has_user_defined(data, begin, end, trie):
    """Whether a piece of the trie stands anywhere in a word."""
    for start in range(begin, end):
        node = np.int64(0)
        for i in range(start, end):
            node = _child(trie, node, data[i])
            if node < 0:
                break
            if trie.ends[node] >= 0:
                return True
    return False


@njit(cache=True, inline="always")
def _put(data, begin, size, piece, after_unknown, pieces, out, at):
    """Writes a piece; an unknown one (-1) as its bytes, or as one id with those before it."""
    if piece >= 0:
        out[at] = piece
        return at + 1
    if pieces.bytes.size:
        for i in range(begin, begin + size):
            out[at] = pieces.bytes[data[i]]
            at += 1
        return at
    if not after_unknown:
        out[at] = pieces.unknown
        return at + 1
    return at


@njit(cache=True)
def _bpe(data, begin, end, pieces, scratch, out, at):
    """Merges of a word: the pair of the highest score first, of equal ones the leftmost.

    Returns:
        The end of its ids in `out`, or -1: it is too long, or has a user-defined symbol.
    """
    symbols, sizes, merged = scratch
    if _has_user_defined(data, begin, end, pieces.trie):
        return np.int64(-1)
    count, i = 0, begin
    while i < end:
        if count == _MOST_SYMBOLS:
            return np.int64(-1)
        size = _character_size(data[i])
        symbols[count] = _get(pieces.characters, _code_point(data, i, size))
        sizes[count] = size
        count += 1
        i += size
    for i in range(count - 1):
        merged[i] = -1
        if symbols[i] >= 0 and symbols[i + 1] >= 0:
            merged[i] = _get(pieces.pairs, (symbols[i] << 32) + symbols[i + 1])
    while True:
        best = -1
        for i in range(count - 1):
            if merged[i] >= 0 and (best < 0 or pieces.scores[merged[i]] > pieces.scores[merged[best]]):
                best = i
        if best < 0:
            break
        symbols[best] = merged[best]
        sizes[best] += sizes[best + 1]
        count -= 1
        for i in range(best + 1, count):
            symbols[i], sizes[i], merged[i] = symbols[i + 1], sizes[i + 1], merged[i + 1]
        for i in range(max(best - 1, 0), min(best + 1, count - 1)):
            merged[i] = -1
            if symbols[i] >= 0 and symbols[i + 1] >= 0:
                merged[i] = _get(pieces.pairs, (symbols[i] << 32) + symbols[i + 1])
    position, after_unknown = begin, False
    for i in range(count):
        known = 0 <= symbols[i] < pieces.scores.size
        at = _put(data, position, sizes[i], symbols[i] if known else -1, after_unknown, pieces, out, at)
        position += sizes[i]
        after_unknown = not known
    return at


@njit(cache=True)
def _viterbi(data, begin, end, score, pieces, out, at):
    """The best path through a word in float32, after words of which the best path has `score`: SentencePiece's order of
    additions and comparisons, so that rounding decides near-ties as it does there.

    Returns:
        The end of its ids in `out`, and the score of the best path to the word's end.
    """
    size, trie = end - begin, pieces.trie
    best = np.zeros(size + 1, np.float32)
    origins, ids = np.full(size + 1, -1, np.int32), np.empty(size + 1, np.int32)
    best[0] = score
    start, reached = 0, 0
    while start < size:
        here = best[start]
        if abs(here) > _RESET:
            for i in range(start, reached + 1):
                if i == start or origins[i] >= 0:
                    best[i] = np.float32(best[i] - here)
            here = np.float32(0.0)
        step = min(np.int64(_character_size(data[begin + start])), size - start)
        node, single, i = np.int64(0), False, start
        while i < size:
            node = _child(trie, node, data[begin + i])
            i += 1
            if node < 0:
                break
            piece = trie.ends[node]
            if piece < 0:
                continue
            reached = max(reached, i)
            candidate = np.float32(pieces.scores[piece] + here)
            if origins[i] < 0 or candidate > best[i]:
                best[i], origins[i], ids[i] = candidate, start, piece
            single |= i - start == step
        if not single:
            i = start + step
            reached = max(reached, i)
            candidate = np.float32(pieces.unknown_score + here)
            if origins[i] < 0 or candidate > best[i]:
                best[i], origins[i], ids[i] = candidate, start, -1
        start += step
    # Backwards to where the path began, then forwards.
    ahead, i = np.empty(size + 1, np.int32), size
    while i > 0:
        ahead[origins[i]] = i
        i = origins[i]
    after_unknown = False
    while i < size:
        piece = ids[ahead[i]]
        at = _put(data, begin + i, ahead[i] - i, piece, after_unknown, pieces, out, at)
        after_unknown = piece < 0
        i = ahead[i]
    return at, best[size]


@njit(cache=True)
def _unigram(data, begin, end, pieces, scratch, out, at):
    """The best path through a word in double precision.

    Returns:
        The end of its ids in `out`; by how much it beats the second best path, infinite if there is none and negative
        if the path has unknown characters; and the characters of the word.
    """
    best, second, origins, ids = scratch
    size, trie = end - begin, pieces.trie
    best[: size + 1] = -np.inf
    second[: size + 1] = -np.inf
    best[0] = 0.0
    start, characters = 0, 0
    while start < size:
        step = min(np.int64(_character_size(data[begin + start])), size - start)
        node, single, i = np.int64(0), False, start
        while i < size:
            node = _child(trie, node, data[begin + i])
            i += 1
            if node < 0:
                break
            piece = trie.ends[node]
            if piece < 0:
                continue
            single |= i - start == step
            score = np.float64(pieces.scores[piece])
            if best[start] + score > best[i]:
                second[i] = max(best[i], second[start] + score)
                best[i], origins[i], ids[i] = best[start] + score, start, piece
            else:
                second[i] = max(second[i], best[start] + score)
        if not single:
            i, score = start + step, np.float64(pieces.unknown_score)
            if best[start] + score > best[i]:
                second[i] = max(best[i], second[start] + score)
                best[i], origins[i], ids[i] = best[start] + score, start, -1
            else:
                second[i] = max(second[i], best[start] + score)
        start += step
        characters += 1
    count, i = 0, size
    while i > 0:
        if ids[i] < 0:
            return at, -1.0, characters
        count += 1
        i = np.int64(origins[i])
    i, position = size, at + count
    while i > 0:
        position -= 1
        out[position] = ids[i]
        i = np.int64(origins[i])
    return at + count, best[size] - second[size], characters


@njit(cache=True)
def fill(words, begin, end, unigram, pieces):
    """Ids of the words [begin, end), whose normalised bytes are there.

    Returns:
        Words that are left to SentencePiece, int32.
    """
    left = np.empty(end - begin, np.int32)
    count = 0
    _, records, _, norms, ids, used = words
    path = (
        np.empty(_MOST_BYTES + 1),
        np.empty(_MOST_BYTES + 1),
        np.empty(_MOST_BYTES + 1, np.int32),
        np.empty(_MOST_BYTES + 1, np.int32),
    )
    merges = (np.empty(_MOST_SYMBOLS, np.int64), np.empty(_MOST_SYMBOLS, np.int64), np.empty(_MOST_SYMBOLS, np.int64))
    heaviest = abs(np.float64(pieces.unknown_score))
    for word in range(begin, end):
        start = records[word, _NORM] >> 24
        stop = start + (records[word, _NORM] & _LOW)
        first = at = used[_USED_IDS]
        margin, characters = np.inf, 0
        while start < stop and at >= 0 and margin >= 0:
            edge = _word_end(norms, start, stop)
            if not unigram:
                at = _bpe(norms, start, edge, pieces, merges, ids, at)
            elif edge - start > _MOST_BYTES:
                margin = -1.0
            else:
                at, one, number = _unigram(norms, start, edge, pieces, path, ids, at)
                margin, characters = min(margin, one), characters + number
            start = edge
        if at < 0:
            left[count] = word
            count += 1
            continue
        if margin < 0:
            at = first
        # Where all sums stay within some size, each is rounded by at most 2⁻²⁴ of it, a path of n pieces n times: two
        # paths compare rightly if they differ by 2 n · 2⁻²⁴ · size. Twice that is asked for.
        limit = margin * 2.0**22 / (characters + 1) if margin >= 0 else -1.0
        records[word, _LIMIT] = np.int64(min(limit, _RESET) - (characters + 1) * heaviest - 1)
        records[word, _IDS] = (first << 24) + (at - first)
        used[_USED_IDS] = at
    return left[:count]


@njit(cache=True)
def emit(found, counts, words, unigram, pieces, score, eod):
    """Ids of texts from their words.

    Args:
        score: of the best path through the words before the first one.
        eod: ends each text that has ids; -1: nothing does.

    Returns:
        ids int32, the number of each text's int64, and the score of the best path through the last text.
    """
    _, records, _, norms, known, _ = words
    room = counts.size
    for word in found:
        room += max(records[word, _NORM] & _LOW, records[word, _IDS] & _LOW)
    out, sizes, scores = np.empty(room, np.int32), np.empty(counts.size, np.int64), pieces.scores
    at, number = np.int64(0), 0
    for text in range(counts.size):
        before = at
        if text > 0:
            score = np.float32(0.0)
        for word in found[number : number + counts[text]]:
            if unigram and abs(score) > records[word, _LIMIT]:
                start = records[word, _NORM] >> 24
                stop = start + (records[word, _NORM] & _LOW)
                while start < stop:
                    edge = _word_end(norms, start, stop)
                    at, score = _viterbi(norms, start, edge, score, pieces, out, at)
                    start = edge
                continue
            first = records[word, _IDS] >> 24
            size = records[word, _IDS] & _LOW
            for i in range(first, first + size):
                out[at] = known[i]
                at += 1
                if unigram:
                    score = np.float32(score + scores[known[i]])
        number += counts[text]
        if at > before and eod >= 0:
            out[at] = eod
            at += 1
        sizes[text] = at - before
    return out[:at], sizes, score
