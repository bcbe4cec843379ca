"""What a SentencePiece model says to those who encode by words: its pieces as tables, and what its rules allow.

`word_cache.py` encodes with it, `word_kernels.py` says what the tables are.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import sentencepiece
from numba import njit

from megatron_mm.data.tokens.word_kernels import Map, Pieces, Trie, make_map

if TYPE_CHECKING:
    from megatron_mm.data.tokens.sentencepiece_tokenizer import SentencePieceTokenizer

#: The escaped space, with which words begin.
SPACE = "\u2581"
#: Releases of SentencePiece whose arithmetic of unigram models `word_kernels.py` repeats.
_UNIGRAM_RELEASES = ("0.2.3",)


@functools.lru_cache(1)
def _parsed(proto: bytes):
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(proto)
    return model


def words_are_independent(tokenizer: SentencePieceTokenizer) -> bool:
    """Whether the ids of a text are those of its words, and `word_kernels.py` knows how they come about."""
    model = _parsed(tokenizer.processor.serialized_model_proto())
    trainer, kinds = model.trainer_spec, model.SentencePiece
    usable = [piece for piece in model.pieces if piece.type in (kinds.NORMAL, kinds.USER_DEFINED, kinds.UNUSED)]
    known = {
        trainer.BPE: all(piece.type != kinds.UNUSED for piece in model.pieces),
        trainer.UNIGRAM: sentencepiece.__version__ in _UNIGRAM_RELEASES
        and all(piece.score <= 0 for piece in model.pieces),
    }
    return (
        known.get(trainer.model_type, False)
        and model.normalizer_spec.escape_whitespaces
        # Not merely what the trainer was told: no piece of the vocabulary holds a space beyond its first character.
        and not any(SPACE in piece.piece[1:] or " " in piece.piece for piece in usable)
        # Every word then begins with a piece of its own, and a run of unknown characters (one <unk>) ends with it.
        and any(piece.piece == SPACE and piece.type == kinds.NORMAL for piece in usable)
        and all(len(piece.piece) > 1 for piece in model.pieces if piece.type not in (kinds.NORMAL, kinds.USER_DEFINED))
    )


def word_model(tokenizer: SentencePieceTokenizer) -> sentencepiece.SentencePieceProcessor:
    """The model for words that are normalised: it leaves them as they are."""
    proto = tokenizer.processor.serialized_model_proto()
    model = type(_parsed(proto)).FromString(proto)
    model.normalizer_spec.Clear()
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = False
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def is_unigram(tokenizer: SentencePieceTokenizer) -> bool:
    """Whether it is a unigram model; otherwise BPE, if `words_are_independent`."""
    trainer = _parsed(tokenizer.processor.serialized_model_proto()).trainer_spec
    return trainer.model_type == trainer.UNIGRAM


def pieces(tokenizer: SentencePieceTokenizer) -> Pieces:
    """The vocabulary as the kernels want it."""
    return _pieces(tokenizer.processor.serialized_model_proto())


@functools.lru_cache(1)  # worker processes that are forked find it made
def _pieces(proto: bytes) -> Pieces:
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
    return Map(*make_map(keys, np.fromiter(entries.values(), np.int32, len(entries))))


@njit(cache=True)
def _double_array(edges, children, ends):
    """Arrays of a Trie.

    Args:
        edges: int64, node · 256 + byte, ascending; nodes are numbered from the root, 0, parents before children.
        children: int64, the node to which each leads.
        ends: int32 by node.
    """
    room = 2 * ends.size + 1024
    bases, parents = np.zeros(room, np.int32), np.full(room, -1, np.int32)
    pieces, places = np.full(room, -1, np.int32), np.zeros(ends.size, np.int64)
    parents[0] = -2
    pieces[0] = ends[0]
    free, begin = 1, 0
    while begin < edges.size:
        end = begin
        while end < edges.size and edges[end] >> 8 == edges[begin] >> 8:
            end += 1
        while parents[free] != -1:
            free += 1
        slot = free
        while True:
            base, fits = slot ^ (edges[begin] & 255), True
            for i in range(begin, end):
                place = base ^ (edges[i] & 255)
                if place >= parents.size - 256:  # rare: twice the room
                    bases = np.concatenate((bases, np.zeros(parents.size, np.int32)))
                    pieces = np.concatenate((pieces, np.full(parents.size, -1, np.int32)))
                    parents = np.concatenate((parents, np.full(parents.size, -1, np.int32)))
                if parents[place] != -1:
                    fits = False
                    break
            if fits:
                break
            slot += 1
        node = places[edges[begin] >> 8]
        bases[node] = base
        for i in range(begin, end):
            place = base ^ (edges[i] & 255)
            parents[place] = node
            pieces[place] = ends[children[i]]
            places[children[i]] = place
        begin = end
    return bases, parents, pieces


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
    return Trie(*_double_array(keys[order], children[order], np.array(ends, np.int32)))


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
    return SPACE.encode() not in charsmap[4 + size :] and not _has_joining_rule(units)


def space_divides(tokenizer: SentencePieceTokenizer) -> bool:
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
        and all(normalize(chr(code)) == SPACE + chr(code) for code in range(33, 127))
        and all(normalize(f"a{space}b") == f"{SPACE}a{SPACE}b" for space in "\t\n\r ")
    )
