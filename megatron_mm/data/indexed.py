"""Megatron's `.bin`/`.idx` format: a streaming writer, and a reader that finds damage when it opens a shard.

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
import os
import struct
from array import array

import numpy as np

from megatron_mm.data.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<QBQQ")
HEADER_SIZE = len(MAGIC) + HEADER.size
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
CODES = {np.dtype(value): code for code, value in DTYPES.items()}
_BLOCK = 1 << 20


def token_dtype(vocab_size: int) -> type[np.generic]:
    """The dtype that Megatron chooses for the ids of a vocabulary."""
    return np.uint16 if vocab_size < 65500 else np.int32


class IndexedWriter:
    """Writes `PREFIX.bin` as documents arrive and `PREFIX.idx` at the end.

    Memory grows by 12 bytes a document, whatever the size of the corpus. Use it on temporary names and rename: `.idx`
    last, since a shard without it does not open.

    Args:
        prefix: path without `.bin`.
        dtype: numpy dtype of the items.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: type[np.generic]) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype)
        self.num_items = 0
        self._lengths = array("i")
        self._documents = array("q", [0])
        self._file = open(self.prefix + ".bin", "wb", buffering=1 << 20)  # noqa: SIM115

    def __len__(self) -> int:
        """Documents written so far."""
        return len(self._documents) - 1

    def add(self, items: np.ndarray | bytes) -> None:
        """Adds one document of one sequence. Bytes are written as they are (dtype uint8)."""
        if isinstance(items, np.ndarray):
            items = np.ascontiguousarray(items, dtype=self.dtype)
            size = items.size
        else:
            size = len(items) // self.dtype.itemsize
        self._file.write(items)
        self._lengths.append(size)
        self._documents.append(len(self._lengths))
        self.num_items += size

    def add_documents(self, items: np.ndarray, lengths: np.ndarray) -> None:
        """Adds many documents at once: their items back to back, and the length of each.

        As in Megatron's preprocessing, a document without items has no sequence.
        """
        lengths = np.asarray(lengths, dtype=np.int32)
        if int(lengths.sum()) != items.size:
            raise ValueError(f"lengths add up to {int(lengths.sum())}, but there are {items.size} items")
        self._file.write(np.ascontiguousarray(items, dtype=self.dtype))
        present = lengths > 0
        ends = len(self._lengths) + np.cumsum(present, dtype=np.int64)
        self._lengths.frombytes(lengths[present].tobytes())
        self._documents.frombytes(ends.tobytes())
        self.num_items += items.size

    def add_shard(self, reader: IndexedReader) -> None:
        """Adds all documents of another shard of the same dtype, as they are."""
        if reader.data.dtype != self.dtype:
            raise DataError(f"{reader.prefix}: dtype {reader.data.dtype}, but {self.prefix} has {self.dtype}")
        offset = len(self._lengths)
        for start in range(0, reader.data.size, _BLOCK):
            self._file.write(np.ascontiguousarray(reader.data[start : start + _BLOCK]))
        self._lengths.frombytes(np.ascontiguousarray(reader.sequence_lengths).tobytes())
        self._documents.frombytes((reader.document_indices[1:] + offset).astype(np.int64).tobytes())
        self.num_items += reader.data.size

    def close(self) -> None:
        """Closes `.bin` without an index (after a failure, which a full disk would repeat here)."""
        with contextlib.suppress(OSError):
            self._file.close()

    def finalize(self) -> None:
        """Flushes `.bin` to the disk and writes `.idx`."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        documents = np.frombuffer(self._documents, dtype=np.int64)
        with open(self.prefix + ".idx", "wb") as stream:
            stream.write(MAGIC + HEADER.pack(1, CODES[self.dtype], lengths.size, documents.size))
            stream.write(lengths)
            end = 0
            for start in range(0, lengths.size, _BLOCK):
                sizes = lengths[start : start + _BLOCK].astype(np.int64) * self.dtype.itemsize
                ends = end + np.cumsum(sizes)
                stream.write(ends - sizes)
                end = int(ends[-1])
            stream.write(documents)
            stream.flush()
            os.fsync(stream.fileno())


class IndexedReader:
    """A memory-mapped shard. Opening it checks that index and data agree to the last byte.

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
        self._check(idx, binary, dtype)
        self.data = (
            np.memmap(binary, dtype=dtype, mode="r") if os.path.getsize(binary) else np.empty(0, dtype=dtype)
        )

    def __reduce__(self):
        return IndexedReader, (self.prefix,)

    def _check(self, idx: str, binary: str, dtype: np.dtype) -> None:
        """Checks pointers, lengths and document boundaries against each other and against the size of `.bin`."""
        lengths, pointers, documents = self.sequence_lengths, self.sequence_pointers, self.document_indices
        end = 0
        for start in range(0, lengths.size, _BLOCK):
            sizes = lengths[start : start + _BLOCK].astype(np.int64) * dtype.itemsize
            expected = end + np.cumsum(sizes) - sizes
            wrong = (pointers[start : start + _BLOCK] != expected) | (sizes < 0)
            if wrong.any():
                at = start + int(np.argmax(wrong))
                raise DataError(
                    f"{idx}: sequence {at} has pointer {int(pointers[at])} and length {int(lengths[at])}; "
                    f"{int(expected[at - start])} bytes precede it"
                )
            end += int(sizes.sum())
        if not documents.size or documents[0] != 0 or documents[-1] != lengths.size:
            raise DataError(f"{idx}: document boundaries must run from 0 to {lengths.size}")
        for start in range(0, documents.size, _BLOCK):
            block = documents[start : start + _BLOCK + 1]
            if (block[1:] < block[:-1]).any():
                at = start + int(np.argmax(block[1:] < block[:-1]))
                raise DataError(f"{idx}: document {at} ends before it begins")
        actual = os.path.getsize(binary)
        if actual != end:
            how = "truncated" if actual < end else "longer than its index says"
            raise DataError(f"{binary}: {how}: {actual} bytes, but {idx} describes {end}")

    def __len__(self) -> int:
        """Documents of the shard."""
        return self.document_indices.size - 1

    def document_lengths(self) -> np.ndarray:
        """Items of each document, int64 [documents]."""
        ends = np.concatenate([[0], np.cumsum(self.sequence_lengths, dtype=np.int64)])
        return np.diff(ends[self.document_indices])

    def document(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Items of a document, or `length` of them from `offset`; a view of the mapped file, not to be written to."""
        first, last = int(self.document_indices[index]), int(self.document_indices[index + 1])
        if first == last:
            return self.data[:0]
        itemsize = self.data.itemsize
        begin = int(self.sequence_pointers[first]) // itemsize
        end = int(self.sequence_pointers[last - 1]) // itemsize + int(self.sequence_lengths[last - 1])
        begin += offset
        return self.data[begin : end if length is None else min(end, begin + length)]
