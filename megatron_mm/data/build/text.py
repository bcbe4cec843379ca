"""Text JSONL → Megatron's `PREFIX_KEY_document.bin/.idx`, byte for byte what its own preprocessing writes, faster.

Raw line blocks go to the workers, which parse and tokenise them and return one array of ids a block: a message costs
the same for one document or a thousand, and the parent only writes. A killed build continues (`jobs/unfinished.py`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from megatron_mm.data.cleaning.drop_list import DropList, drop_options
from megatron_mm.data.corpus.record_lines import MAX_LINE_BYTES
from megatron_mm.data.corpus.samples import parse_line, text_field
from megatron_mm.data.jobs.parallel import LineBlock
from megatron_mm.data.jobs.skipped import LIST, LISTED, OnError, SkippedLine, SkippedLines
from megatron_mm.data.jobs.unfinished import Lines, Replacing, UnfinishedBuild, check_output
from megatron_mm.data.store.indexed import CHECKSUMS, MAGIC, IndexedWriter, token_dtype
from megatron_mm.data.store.layout import SUFFIXES
from megatron_mm.data.store.manifest import describe_sources, is_of, write_manifest
from megatron_mm.data.tokens.block_encoder import BlockEncoder
from megatron_mm.data.tokens.sentences import MAX_CHARACTERS, SentenceSplitter, is_cut
from megatron_mm.data.tokens.tokenizer import open_tokenizer
from megatron_mm.media.errors import DataError

FORMAT = "megatron text shard"
_BLOCK_BYTES = 1 << 18


@dataclass(frozen=True)
class Sentences:
    """How documents are split into sentences (`SentenceSplitter`)."""

    language: str = "english"
    keep_space: bool = False
    nltk_data: str | None = None


@dataclass
class TextBlock:
    """Ids of the documents of a block, for one key."""

    ids: np.ndarray
    lengths: np.ndarray
    """Of documents, or of their sentences."""
    sentences: np.ndarray | None = None
    """Sentences of each document."""
    cut: int = 0
    """Documents that are longer than what is split into sentences at a time."""


class _Worker:
    """State of one worker process."""

    @classmethod
    def start(
        cls,
        tokenizer: str,
        keys: tuple[str, ...],
        append_eod: bool,
        sentences: Sentences | None,
        on_error: OnError,
        drop: str | None,
    ) -> None:
        model = open_tokenizer(tokenizer, require_media=False)
        eod = model.eos_id if append_eod else None
        if sentences is None:
            encode = model.block_encoder(eod)
            cls.encode = lambda texts: TextBlock(*encode(texts))
        else:
            split = SentenceSplitter(sentences.language, sentences.nltk_data, sentences.keep_space)
            encode = model.block_encoder(None)
            cls.encode = lambda texts: _encode_sentences(texts, split, encode, eod)
        cls.keys, cls.on_error = keys, on_error
        cls.drops = DropList(drop) if drop is not None else None
        cls.dtype = token_dtype(model.vocab_size)


def _encode_sentences(
    texts: Sequence[str], split: SentenceSplitter, encode: BlockEncoder, eod: int | None
) -> TextBlock:
    """Documents as sentences; `eod` ends the last sentence that has tokens."""
    found = [split(text) for text in texts]
    counts = np.fromiter(map(len, found), np.int64, len(found))
    ids, lengths = encode([sentence for sentences in found for sentence in sentences])
    if eod is not None:
        ends = np.cumsum(lengths, dtype=np.int64)
        present = np.flatnonzero(lengths)
        # The last sentence with tokens of each document that has one.
        document = np.repeat(np.arange(counts.size), counts)[present]
        last = present[np.append(document[1:] != document[:-1], True)] if present.size else present
        ids, lengths = np.insert(ids, ends[last], eod), lengths.copy()
        lengths[last] += 1
    return TextBlock(ids, lengths, counts, sum(map(is_cut, texts)))


def _encode_block(block: LineBlock) -> tuple[list[TextBlock], list[SkippedLine]]:
    """Tokenises the lines of a block; runs in a worker."""
    texts: list[list[str]] = [[] for _ in _Worker.keys]
    skipped = []
    dropped = _Worker.drops.within(block) if _Worker.drops is not None else ()
    for number, line in enumerate(block.data.split(b"\n"), block.first_line):
        if not line or line.isspace() or number in dropped:
            continue
        where = f"{block.path}, line {number}"
        try:
            record = parse_line(line, where, exact=False)  # its texts are strings
            fields = [text_field(record, key, where) for key in _Worker.keys]
        except DataError as error:
            if _Worker.on_error == "stop":
                raise
            skipped.append(SkippedLine.of(block.path, number, error))
            continue
        for field, values in zip(fields, texts):
            values.append(field)
    out = []
    for values in texts:
        encoded = _Worker.encode(values)
        encoded.ids = encoded.ids.astype(_Worker.dtype, copy=False)
        out.append(encoded)
    return out, skipped


def differs_from_shard(path: str) -> str | None:
    """What tells that a file is not of a text shard, as we or Megatron write it, or a list of skipped lines.

    A `.bin` and its checksums are numbers without a header: what they are is told by the index, or the manifest, beside
    them.
    """
    prefix, suffix = os.path.splitext(path)
    if not os.path.isfile(path):
        return "is no file"
    if path.endswith(f"_{LIST}"):
        return None if LISTED.includes(path) else "is no list of skipped lines"
    if suffix == ".json":
        return None if is_of(path, FORMAT) else f"is no manifest of the format {FORMAT!r}"
    if _is_index(prefix + ".idx") or (suffix != ".idx" and is_of(prefix + ".json", FORMAT)):
        return None
    return "is no index of Megatron's" if suffix == ".idx" else "has neither index nor manifest of a shard beside it"


def _is_index(path: str) -> bool:
    try:
        with open(path, "rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def build_text(
    inputs: Sequence[str],
    output_prefix: str,
    tokenizer: str,
    json_keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    workers: int = 2,
    overwrite: bool = False,
    log_interval: int = 1000,
    progress: bool = True,
    drop: str | None = None,
    on_error: OnError = "stop",
    sentences: Sentences | None = None,
) -> dict[str, dict[str, float]]:
    """Tokenises JSONL files, or others with the same fields, into one shard a key.

    Args:
        inputs: files of the formats of `corpus/text_input.py`, read in this order.
        output_prefix: shards are named PREFIX_KEY_document.
        tokenizer: a file that `open_tokenizer` reads; needs `</s>` only.
        json_keys: text fields; every line must have all of them.
        append_eod: end each document that has tokens with `</s>`.
        workers: processes; 0 works in this one. The output does not depend on it.
        overwrite: replace existing shards, Megatron's own too.
        log_interval: documents between refreshes of the progress bar.
        progress: show a bar.
        drop: folder of tools/clean_corpus.py, made of all these inputs; the lines that it names are left out.
        on_error: "skip" leaves out lines that cannot be used, and lists them in PREFIX_skipped.jsonl (jobs/skipped.py).
        sentences: split documents into sentences, each a sequence of its document; None: documents are whole.

    Returns:
        Documents, tokens, documents that were cut before they were split into sentences and lines skipped if any,
        bytes and seconds, by shard prefix.

    Raises:
        DataError: a line cannot be used (file, line and cause are named; what was built before it is kept where the
            build was long, and continued from when the line is mended), an output exists, or an input is not
            the one that was cleaned.
    """
    model = open_tokenizer(tokenizer, require_media=False)
    level = "document" if sentences is None else "sentence"
    prefixes = [f"{output_prefix}_{key}_{level}" for key in json_keys]
    listed = f"{output_prefix}_{LIST}"
    finals = [prefix + suffix for prefix in prefixes for suffix in SUFFIXES] + [listed]
    replacing = Replacing(overwrite, differs_from_shard, "choose another --output-prefix or pass --overwrite")
    check_output(output_prefix, finals, replacing)
    os.makedirs(os.path.dirname(os.path.abspath(output_prefix)), exist_ok=True)
    begin = time.perf_counter()
    made_by = {"identity": model.identity, "vocab_size": model.vocab_size}
    how = {"append_eod": append_eod, "on_error": on_error, **drop_options(drop, inputs)}
    if sentences is not None:
        SentenceSplitter(sentences.language, sentences.nltk_data)  # says at once what is missing
        how["sentences"] = {
            "language": sentences.language, "keep_space": sentences.keep_space, "max_characters": MAX_CHARACTERS,
        }  # fmt: skip
    options = {"format": FORMAT, "tokenizer": made_by, "keys": list(json_keys), **how}
    model.prepare()
    build = UnfinishedBuild(output_prefix, options)
    writer = TextWriter(build.data, json_keys, token_dtype(model.vocab_size))
    initargs = (tokenizer, tuple(json_keys), append_eod, sentences, on_error, drop)
    lines = Lines(_encode_block, _Worker.start, initargs, workers, _BLOCK_BYTES, max_line=MAX_LINE_BYTES)
    read_bytes = shown = 0
    total = sum(os.path.getsize(path) for path in inputs if os.path.exists(path))
    try:
        build.begin()
        with tqdm(total=total, unit="B", unit_scale=True, desc="text", disable=not progress, mininterval=0.5) as bar:
            for block in build.read_lines(inputs, writer, lines, bar):
                read_bytes += len(block.data)
                if len(writer) >= shown + log_interval:
                    shown = len(writer)
                    rate = writer.added / max(1e-9, time.perf_counter() - begin)
                    bar.set_postfix_str(f"{shown} documents, {rate / 1e6:.2f} Mtok/s", refresh=False)
        if not len(writer) and not writer.skipped.count:
            raise DataError(f"{', '.join(inputs)}: no documents")
        manifest = {"tokenizer": made_by, "options": how, "sources": describe_sources(inputs)}
        counts = writer.finish(manifest)
        # The index last: a shard without it does not open.
        names = [(key + suffix, prefix + suffix) for suffix in SUFFIXES for key, prefix in zip(json_keys, prefixes)]
        if writer.skipped.count:
            names.insert(0, (LIST, listed))
        elif os.path.exists(listed):  # of the build that this one replaces
            replacing.check([listed])
            os.remove(listed)
        build.place(names, replacing)
    except BaseException as error:
        writer.close()
        build.explain(error)
        raise
    seconds = time.perf_counter() - begin
    return {prefix: {**figures, "bytes": read_bytes, "seconds": seconds} for prefix, figures in zip(prefixes, counts)}


class TextWriter:
    """Writes a shard a key, under the keys' names.

    Args:
        folder: an existing folder.
        keys: of the texts.
        dtype: of the ids.
    """

    def __init__(self, folder: str, keys: Sequence[str], dtype: type[np.generic]) -> None:
        self.prefixes, self.dtype = [os.path.join(folder, key) for key in keys], dtype
        self.added = 0
        """Tokens since this process began."""
        self._cut: list[int] = []
        self._writers: list[IndexedWriter] = []
        self.skipped = SkippedLines(folder)

    def __len__(self) -> int:
        """Documents written so far."""
        return len(self._writers[0])

    def begin(self, state: dict | None) -> None:
        """Opens the files: new, or as they were at `state`."""
        self._writers = []
        state = state or {}
        self._cut = state.get("cut", [0] * len(self.prefixes))
        states = state.get("shards", [None] * len(self.prefixes))
        for prefix, value in zip(self.prefixes, states):
            self._writers.append(IndexedWriter(prefix, self.dtype, value))
        self.skipped.begin(state.get("skipped"))

    def add(self, result: tuple[list[TextBlock], list[SkippedLine]]) -> None:
        """Appends a block of each key, and lists the lines left out."""
        blocks, skipped = result
        self.skipped.add(skipped)
        for number, (writer, block) in enumerate(zip(self._writers, blocks)):
            writer.add_documents(block.ids, block.lengths, block.sentences)
            self.added += block.ids.size
            self._cut[number] += block.cut

    def state(self) -> dict:
        """How far the files are; all of it is on the disk."""
        shards, cut = [writer.state() for writer in self._writers], {"cut": self._cut} if any(self._cut) else {}
        return {"shards": shards, "skipped": self.skipped.state(), **cut}

    def finish(self, manifest: dict) -> list[dict[str, int]]:
        """Writes indexes and manifests; counts of each shard."""
        counts, skipped = [], self.skipped.finish(len(self))
        for prefix, writer, cut in zip(self.prefixes, self._writers, self._cut):
            writer.finalize()
            sizes = {"documents": len(writer), "tokens": writer.num_items, **({"cut": cut} if cut else {})}
            counts.append({**sizes, **skipped})
            write_text_manifest(prefix, {"counts": counts[-1], **manifest})
        return counts

    def close(self) -> None:
        """Closes the files, whatever they hold."""
        for writer in self._writers:
            writer.close()
        self.skipped.close()


def write_text_manifest(prefix: str, manifest: dict) -> None:
    """Writes what made a text shard beside it, so that reading it with another tokenizer is refused."""
    names = (".bin", ".idx", CHECKSUMS)
    write_manifest(prefix + ".json", {"format": FORMAT, "version": 1, **manifest}, prefix, names)
