"""Megatron's `.bin`/`.idx` format: a streaming writer, and a reader that finds damage and never reads past it.

Opening a shard checks its sizes and, up to `CHECKED_AT_OPEN` sequences, all of its index; of a larger one the rest is
checked when its packing is planned and by `inspect_dataset --verify` (`IndexedReader.check`), and around each document
when it is read. So a shard of any size opens in milliseconds.

The files are byte for byte those of megatron-core's `IndexedDatasetBuilder`, and either library reads the other's (a
test checks both directions). The format is written here again because importing megatron-core takes seconds in every
tool and worker, its builder keeps Python lists of all lengths, and its reader checks almost nothing: a truncated `.bin`
opens there and fails, or returns garbage, days later.

Layout of `.idx`: 9 bytes magic, version (u64), dtype code (u8), sequences n (u64), documents + 1 (u64), lengths
(i32 × n), byte pointers (i64 × n), first sequence of each document and the end (i64). `.bin` is the sequences, back to
back.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import BinaryIO

import numpy as np

from megatron_mm.media.errors import DataError
from megatron_mm.platform.atomic_files import sync

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<QBQQ")
HEADER_SIZE = len(MAGIC) + HEADER.size
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
CODES = {np.dtype(value): code for code, value in DTYPES.items()}
#: CRC-32 of each document (u32), which `inspect_dataset --verify` compares.
CHECKSUMS = ".crc"
#: While a shard is written: its lengths (i32) and document ends (i64), of which the index is made.
LENGTHS, DOCUMENTS = ".lengths", ".ends"
#: Sequences of an index that opening it checks.
CHECKED_AT_OPEN = 1 << 20
_BLOCK = 1 << 20


def token_dtype(vocab_size: int) -> type[np.generic]:
    """The dtype that Megatron chooses for the ids of a vocabulary."""
    return np.uint16 if vocab_size < 65500 else np.int32


class IndexedWriter:
    """Writes `PREFIX.bin` as documents arrive and `PREFIX.idx` at the end; `PREFIX.crc` has a checksum a document.

    Lengths and boundaries wait in files of their own until the end, so memory does not grow with the corpus, and a
    writer can be taken up where an earlier one was (`state`). Use it in a folder of its own or on temporary names.

    Args:
        prefix: path without `.bin`.
        dtype: numpy dtype of the items.
        state: what `state()` said of an earlier writer of these files; what they hold beyond it is cut off.
    """

    def __init__(
        self, prefix: str | os.PathLike[str], dtype: type[np.generic], state: dict[str, int] | None = None
    ) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype)
        state = state or {"items": 0, "sequences": 0, "documents": 0}
        self.num_items, self._sequences, self._documents = state["items"], state["sequences"], state["documents"]
        sizes = {
            ".bin": self.num_items * self.dtype.itemsize,
            LENGTHS: 4 * self._sequences,
            DOCUMENTS: 8 * self._documents,
            CHECKSUMS: 4 * self._documents,
        }
        self._files = {suffix: open_at(self.prefix + suffix, size) for suffix, size in sizes.items()}

    def __len__(self) -> int:
        """Documents written so far."""
        return self._documents

    def add(self, items: np.ndarray | bytes) -> None:
        """Adds one document of one sequence. Bytes are written as they are (dtype uint8)."""
        if isinstance(items, np.ndarray):
            items = np.ascontiguousarray(items, dtype=self.dtype).data
        data = memoryview(items)
        size = data.nbytes // self.dtype.itemsize
        self._sequences += 1
        self._documents += 1
        self.num_items += size
        self._files[".bin"].write(data)
        self._files[LENGTHS].write(struct.pack("<i", size))
        self._files[DOCUMENTS].write(struct.pack("<q", self._sequences))
        self._files[CHECKSUMS].write(struct.pack("<I", zlib.crc32(data)))

    def add_documents(self, items: np.ndarray, lengths: np.ndarray, sentences: np.ndarray | None = None) -> None:
        """Adds many documents at once.

        As in Megatron's preprocessing, a document or a sentence without items has no sequence.

        Args:
            items: of all documents, back to back.
            lengths: items of each document, or of each of their sentences.
            sentences: number of sentences of each document; None: documents are not divided.
        """
        lengths = np.asarray(lengths, dtype=np.int32)
        if int(lengths.sum()) != items.size:
            raise ValueError(f"lengths add up to {int(lengths.sum())}, but there are {items.size} items")
        data = np.ascontiguousarray(items, dtype=self.dtype).view(np.uint8).data
        last = np.cumsum(np.ones(lengths.size, np.int64) if sentences is None else sentences, dtype=np.int64)
        present = lengths > 0
        ends = self._sequences + np.concatenate([[0], np.cumsum(present, dtype=np.int64)])[last]
        bytes_before = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[last] * self.dtype.itemsize
        bounds = itertools.pairwise([0, *bytes_before.tolist()])
        checksums = [zlib.crc32(data[begin:end]) for begin, end in bounds]
        self._files[".bin"].write(data)
        self._files[LENGTHS].write(lengths[present].tobytes())
        self._files[DOCUMENTS].write(ends.tobytes())
        self._files[CHECKSUMS].write(np.array(checksums, dtype="<u4").tobytes())
        self._sequences += int(present.sum())
        self._documents += last.size
        self.num_items += items.size

    def add_copies(self, reader: IndexedReader, documents: Sequence[int]) -> None:
        """Adds documents of another shard of the same dtype with their sequences, as they are.

        Raises:
            DataError: another dtype, or a document differs from its checksum.
        """
        if reader.data.dtype != self.dtype:
            raise DataError(f"{reader.prefix}: dtype {reader.data.dtype}, but {self.prefix} has {self.dtype}")
        for document in documents:
            data = np.ascontiguousarray(reader.checked(document))
            first, last = reader.document_indices[document : document + 2].tolist()
            self._sequences += last - first
            self._documents += 1
            self.num_items += data.size
            self._files[".bin"].write(data)
            self._files[LENGTHS].write(reader.sequence_lengths[first:last].tobytes())
            self._files[DOCUMENTS].write(struct.pack("<q", self._sequences))
            self._files[CHECKSUMS].write(struct.pack("<I", zlib.crc32(data)))

    def state(self) -> dict[str, int]:
        """How far this writer is; all of it is on the disk."""
        for stream in self._files.values():
            sync(stream)
        return {"items": self.num_items, "sequences": self._sequences, "documents": self._documents}

    def close(self) -> None:
        """Closes the files without an index (after a failure, which a full disk would repeat here)."""
        for stream in self._files.values():
            with contextlib.suppress(OSError):
                stream.close()

    def discard(self) -> None:
        """Closes and removes the files."""
        self.close()
        for suffix in (*self._files, ".idx"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.prefix + suffix)

    def finalize(self) -> None:
        """Writes `.idx`; all is then on the disk. Until `tidy`, another writer can be taken up where this was."""
        self.state()
        self.close()
        with open(self.prefix + ".idx", "wb") as stream:
            stream.write(MAGIC + HEADER.pack(1, CODES[self.dtype], self._sequences, self._documents + 1))
            stream.writelines(_blocks_of(self.prefix + LENGTHS, np.int32))
            end = 0
            for lengths in _blocks_of(self.prefix + LENGTHS, np.int32):
                sizes = lengths.astype(np.int64) * self.dtype.itemsize
                ends = end + np.cumsum(sizes)
                stream.write(ends - sizes)
                end = int(ends[-1])
            stream.write(struct.pack("<q", 0))
            stream.writelines(_blocks_of(self.prefix + DOCUMENTS, np.int64))
            sync(stream)

    def tidy(self) -> None:
        """Removes what only a continued writer would need; to be called when all is finished."""
        os.remove(self.prefix + LENGTHS)
        os.remove(self.prefix + DOCUMENTS)


def open_at(path: str, size: int) -> BinaryIO:
    """A file to write from `size` on: new, or an earlier one whose bytes beyond that are cut off.

    Raises:
        DataError: it holds less.
    """
    if not size:
        return open(path, "wb", buffering=1 << 20)
    stream = open(path, "r+b", buffering=1 << 20)  # noqa: SIM115
    if (held := stream.seek(0, os.SEEK_END)) < size:
        stream.close()
        raise DataError(f"{path}: truncated: {held} bytes of {size}")
    stream.truncate(size)
    stream.seek(size)
    return stream


def _blocks_of(path: str, dtype: type[np.generic]) -> Iterator[np.ndarray]:
    with open(path, "rb") as stream:
        while data := stream.read(_BLOCK):
            yield np.frombuffer(data, dtype=dtype)


class IndexedReader:
    """A memory-mapped shard.

    Args:
        prefix: path without `.bin`.

    Raises:
        DataError: a file is missing, truncated or not of this format, or index and data disagree.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        idx, binary = self.prefix + ".idx", self.prefix + ".bin"
        for path in (idx, binary):
            if not os.path.isfile(path):
                raise DataError(f"{path}: missing (a shard is the pair {self.prefix}.bin and .idx)")
        size = os.path.getsize(idx)
        with open(idx, "rb") as stream:
            header = stream.read(HEADER_SIZE)
        if header[: len(MAGIC)] != MAGIC[: len(header)] or not header:
            raise DataError(f"{idx}: not a Megatron index (it begins with {header[:9]!r}, not {MAGIC!r})")
        if len(header) < HEADER_SIZE:
            raise DataError(f"{idx}: truncated in its header ({size} bytes)")
        version, code, num_sequences, num_documents = HEADER.unpack(header[len(MAGIC) :])
        if version != 1:
            raise DataError(f"{idx}: version {version}; this program reads version 1")
        if code not in DTYPES:
            raise DataError(f"{idx}: unknown dtype code {code}; known are {sorted(DTYPES)}")
        expected = HEADER_SIZE + 12 * num_sequences + 8 * num_documents
        if size not in (expected, expected + num_sequences):  # a mode per sequence follows in Megatron's multimodal
            how = "truncated" if size < expected else "too long"
            raise DataError(
                f"{idx}: {how}: {size} bytes, but {num_sequences} sequences and {num_documents - 1} documents "
                f"take {expected}"
            )
        dtype = np.dtype(DTYPES[code])
        raw = np.memmap(idx, mode="r")
        middle, end = HEADER_SIZE + 4 * num_sequences, HEADER_SIZE + 12 * num_sequences
        self.sequence_lengths = raw[HEADER_SIZE:middle].view(np.int32)
        self.sequence_pointers = raw[middle:end].view(np.int64)
        self.document_indices = raw[end : end + 8 * num_documents].view(np.int64)
        self._itemsize = dtype.itemsize
        if max(num_sequences, num_documents) <= CHECKED_AT_OPEN:
            self.check()
        self._check_ends(idx, binary)
        self.data = np.memmap(binary, dtype=dtype, mode="r") if os.path.getsize(binary) else np.empty(0, dtype=dtype)

    def __reduce__(self):
        return IndexedReader, (self.prefix,)

    def _check_ends(self, idx: str, binary: str) -> None:
        """Checks the ends of the index against each other and against the size of `.bin`."""
        lengths, pointers, documents = self.sequence_lengths, self.sequence_pointers, self.document_indices
        if not documents.size or documents[0] != 0 or documents[-1] != lengths.size:
            raise DataError(f"{idx}: document boundaries must run from 0 to {lengths.size}")
        end = int(pointers[-1]) + int(lengths[-1]) * self._itemsize if lengths.size else 0
        actual = os.path.getsize(binary)
        if actual != end:
            how = "truncated" if actual < end else "longer than its index says"
            raise DataError(f"{binary}: {how}: {actual} bytes, but {idx} describes {end}")

    def check(self) -> None:
        """Checks every pointer, length and document boundary; memory does not grow with the shard.

        Raises:
            DataError: file, sequence or document, and what is wrong.
        """
        idx, itemsize = self.prefix + ".idx", self._itemsize
        lengths, pointers, documents = self.sequence_lengths, self.sequence_pointers, self.document_indices
        end = 0
        for start in range(0, lengths.size, _BLOCK):
            sizes = lengths[start : start + _BLOCK].astype(np.int64) * itemsize
            expected = end + np.cumsum(sizes) - sizes
            wrong = (pointers[start : start + _BLOCK] != expected) | (sizes < 0)
            if wrong.any():
                at = start + int(np.argmax(wrong))
                raise DataError(
                    f"{idx}: sequence {at} has pointer {int(pointers[at])} and length {int(lengths[at])}; "
                    f"{int(expected[at - start])} bytes precede it"
                )
            end += int(sizes.sum())
        for start in range(0, documents.size, _BLOCK):
            block = documents[start : start + _BLOCK + 1]
            if (block[1:] < block[:-1]).any():
                at = start + int(np.argmax(block[1:] < block[:-1]))
                raise DataError(f"{idx}: document {at} ends before it begins")

    def __len__(self) -> int:
        """Documents of the shard."""
        return self.document_indices.size - 1

    def document_lengths(self, documents: np.ndarray | None = None) -> np.ndarray:
        """Items of each document, or of those named, int64 [documents]."""
        if documents is None:
            documents = np.arange(len(self))
        first, last = self.document_indices[documents], self.document_indices[documents + 1]
        if (last - first <= 1).all():  # text without sentences, and all media
            lengths = np.zeros(len(documents), np.int64)
            present = last > first
            lengths[present] = self.sequence_lengths[first[present]]
            return lengths
        ends = self._sequence_start(last) - self._sequence_start(first)
        return ends // self.data.itemsize

    def _sequence_start(self, sequences: np.ndarray) -> np.ndarray:
        """First byte of sequences; that of the one behind the last is the end."""
        starts = np.full(len(sequences), self.data.nbytes, np.int64)
        inside = sequences < self.sequence_pointers.size
        starts[inside] = self.sequence_pointers[sequences[inside]]
        return starts

    def document(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Items of a document, or `length` of them from `offset`; a view of the mapped file, not to be written to.

        Raises:
            DataError: the index is damaged here.
        """
        first, last = int(self.document_indices[index]), int(self.document_indices[index + 1])
        if first == last:
            return self.data[:0]
        count, size, itemsize = self.sequence_lengths.size, self.data.nbytes, self.data.itemsize
        if not 0 <= first < last <= count:
            raise DataError(f"{self.prefix}.idx: document {index} has sequences {first} to {last} of {count}")
        begin, end = int(self.sequence_pointers[first]), int(self.sequence_pointers[last]) if last < count else size
        held = int(self.sequence_lengths[first:last].sum(dtype=np.int64)) * itemsize
        if not 0 <= begin <= end <= size or end - begin != held:
            raise DataError(
                f"{self.prefix}.idx: document {index} takes bytes {begin} to {end} of {size}, but its lengths add up "
                f"to {held}"
            )
        begin, end = begin // itemsize + offset, end // itemsize
        return self.data[begin : end if length is None else min(end, begin + length)]

    @cached_property
    def checksums(self) -> np.ndarray | None:
        """CRC-32 of each document, u32 [documents]; None where there is no `.crc` (Megatron writes none).

        Raises:
            DataError: `.crc` is not of these documents.
        """
        path = self.prefix + CHECKSUMS
        if not os.path.exists(path):
            return None
        size = os.path.getsize(path)
        if size != 4 * len(self):
            raise DataError(f"{path}: {size // 4} checksums for {len(self)} documents")
        return np.memmap(path, dtype="<u4", mode="r") if size else np.empty(0, dtype="<u4")

    def checked(self, index: int) -> np.ndarray:
        """`document(index)`, compared with its checksum. Raises DataError if it differs."""
        data = self.document(index)
        if self.checksums is not None and zlib.crc32(np.ascontiguousarray(data)) != self.checksums[index]:
            raise DataError(f"{self.prefix}.bin, document {index}: its CRC-32 is not the one with which it was written")
        return data

    def damaged(self) -> list[int]:
        """Documents that differ from their checksums; none where there is no `.crc`.

        Raises:
            DataError: `.crc` is not of these documents.
        """
        if self.checksums is None:
            return []
        found = (zlib.crc32(np.ascontiguousarray(self.document(number))) for number in range(len(self)))
        return [number for number, checksum in enumerate(found) if checksum != self.checksums[number]]
