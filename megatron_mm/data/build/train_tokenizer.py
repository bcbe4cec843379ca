"""Training of a SentencePiece model with the special tokens that multimodal shards need.

Text goes in line by line; placeholders written in the text are cut out of it first, because they are symbols of the
model, not words to learn.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from typing import Literal

import sentencepiece

from megatron_mm.config.outputs import Kind, check_file
from megatron_mm.data.corpus.record_lines import MAX_LINE_BYTES, read_line
from megatron_mm.data.corpus.samples import parse_line
from megatron_mm.data.corpus.text_input import holds_records, open_lines
from megatron_mm.data.tokens.tokenizer import AUDIO, BOS, EOS, IMAGE, MASK, PAD, UNK, VIDEO
from megatron_mm.media.errors import DataError
from megatron_mm.platform.atomic_files import written_whole

_SPECIAL = re.compile("|".join(map(re.escape, (PAD, UNK, BOS, EOS, IMAGE, AUDIO, VIDEO, MASK))))
_MODEL = Kind("a SentencePiece model", lambda path: bool(sentencepiece.SentencePieceProcessor(model_file=path)))
_CHUNK = 8192  # characters of a line handed to SentencePiece at once


def training_lines(inputs: Sequence[str], json_keys: Sequence[str]) -> Iterator[str]:
    """Lines to learn from.

    Args:
        inputs: files of the formats of `corpus/text_input.py` (the fields `json_keys` of each record that has them; one
            at least), any other file as plain text; `.gz` and `.zst` too.
        json_keys: names of the fields.

    Raises:
        DataError: a line is not JSON, not UTF-8, or has none of the fields.
    """
    for path in inputs:
        is_json, number = holds_records(path), 0
        with open_lines(path) as (stream, _):
            while line := read_line(stream, MAX_LINE_BYTES, f"{path}, line {number + 1}"):
                number += 1
                where = f"{path}, line {number}"
                if not line.strip():
                    continue
                if is_json:
                    record = parse_line(line, where)
                    texts = [record[key] for key in json_keys if isinstance(record.get(key), str)]
                    if not texts:
                        raise DataError(f"{where}: has none of the text fields {', '.join(json_keys)}")
                else:
                    try:
                        texts = [line.decode("utf-8")]
                    except UnicodeDecodeError as error:
                        raise DataError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
                for text in texts:
                    for part in _SPECIAL.sub("\n", text).split("\n"):
                        if part.strip():
                            yield from (part[i : i + _CHUNK] for i in range(0, len(part), _CHUNK))


def train_tokenizer(
    inputs: Sequence[str],
    output: str,
    vocab_size: int,
    model_type: Literal["unigram", "bpe"] = "unigram",
    json_keys: Sequence[str] = ("text",),
    character_coverage: float = 0.9995,
    normalization: str = "nmt_nfkc",
    max_sentences: int = 0,
    num_threads: int = 4,
) -> int:
    """Trains a model and writes it atomically.

    Args:
        inputs: text, or files with text fields.
        output: the `.model` file to write; a SentencePiece model that is there is replaced.
        vocab_size: pieces wanted, special tokens and 256 byte pieces included. A small corpus may yield fewer.
        model_type: SentencePiece's algorithm.
        json_keys: text fields of records.
        character_coverage: share of characters that get a piece of their own; the others fall back to bytes.
        normalization: SentencePiece's rule, or "identity".
        max_sentences: lines drawn at random from the input; 0 takes all.
        num_threads: of the trainer. Part of the recipe: sums in another order may change the last pieces.

    Returns:
        The size of the vocabulary.

    Raises:
        DataError: no text, or a vocabulary too small for the characters and bytes.
        OutputError: `output` is something else than a model, or no place for one.
    """
    check_file(output, "--output", _MODEL)
    model = io.BytesIO()
    limit = {"input_sentence_size": max_sentences, "shuffle_input_sentence": True} if max_sentences else {}
    lines = training_lines(inputs, json_keys)
    first = next(lines, None)
    if first is None:
        raise DataError(f"{', '.join(inputs)}: no text to learn from")

    failures: list[Exception] = []

    def feed() -> Iterator[str]:
        """The lines until one cannot be read: what a generator raises, SentencePiece 0.2.1 loses."""
        yield first
        try:
            yield from lines
        except Exception as error:
            failures.append(error)

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=feed(), model_writer=model, vocab_size=vocab_size, model_type=model_type,
            character_coverage=character_coverage, normalization_rule_name=normalization, byte_fallback=True,
            pad_id=0, unk_id=1, bos_id=2, eos_id=3, pad_piece=PAD, unk_piece=UNK, bos_piece=BOS, eos_piece=EOS,
            user_defined_symbols=[IMAGE, AUDIO, VIDEO, MASK], hard_vocab_limit=False, max_sentence_length=4 * _CHUNK,
            num_threads=num_threads, minloglevel=2, **limit,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        if failures:
            raise failures[0] from None
        raise DataError(f"--vocab-size {vocab_size}: SentencePiece refused: {error}") from error
    if failures:
        raise failures[0]
    with written_whole(output, "xb") as stream:
        stream.write(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
