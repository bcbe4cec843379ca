"""Datasets on disk, opened and checked: a text shard (Megatron's prefix) or a multimodal folder.

Both look the same to what follows: documents with token lengths, prompt lengths and media counts, read by number.
Whatever is missing, cut off, or disagrees is reported here, by file; of a very large dataset, row by row in `check` and
around what is read (see indexed.py).
"""

from __future__ import annotations

import os
from collections import Counter

import numpy as np

from megatron_mm.data.corpus.samples import KINDS, TABLE_DTYPE
from megatron_mm.data.store.arrays import load_array
from megatron_mm.data.store.indexed import CHECKED_AT_OPEN, IndexedReader
from megatron_mm.data.store.layout import FORMAT, MEDIA_SHARDS, TABLE, VERSION, table_counts
from megatron_mm.data.store.manifest import MANIFEST, read_manifest
from megatron_mm.data.tokens.tokenizer import Tokenizer
from megatron_mm.media.errors import DataError

_FIRST = {"images": "first_image", "audios": "first_audio", "videos": "first_video"}
_SCANNED_TOKENS = 1 << 20
_BLOCK = 1 << 20


class Shard:
    """One dataset on disk.

    Args:
        path: prefix of a text shard, or a folder made by tools/preprocess_multimodal.py.
        tokenizer: model with which the run reads it; None leaves identity and ids unchecked.

    Raises:
        DataError: damage, or another tokenizer.
    """

    def __init__(self, path: str, tokenizer: Tokenizer | None = None) -> None:
        self.path = os.path.normpath(path)
        self.name = os.path.basename(self.path)
        self.manifest: dict = {}
        self.table: np.ndarray | None = None
        self.media: dict[str, IndexedReader] = {}
        self.ids: IndexedReader | None = None
        if os.path.isdir(self.path):
            self._open_folder()
        else:
            self._open_text()
        if not len(self.text):
            raise DataError(f"{self.path}: holds no documents")
        if self.table is not None:
            self._check_shape(self.table)
            if len(self) <= CHECKED_AT_OPEN:
                self._check_table(self.table)
        if tokenizer is not None:
            self._check_tokenizer(tokenizer)

    def __len__(self) -> int:
        """Documents."""
        return len(self.text)

    @property
    def is_multimodal(self) -> bool:
        """The dataset is a folder with a sample table."""
        return self.table is not None

    def _open_text(self) -> None:
        if self.path.endswith((".bin", ".idx")):
            raise DataError(f"{self.path}: give the prefix, {self.path[:-4]}")
        if not os.path.exists(self.path + ".idx") and not os.path.exists(self.path + ".bin"):
            raise DataError(
                f"{self.path}: neither a folder made by tools/preprocess_multimodal.py nor the prefix of a text "
                f"shard ({self.path}.bin and .idx)"
            )
        self.text = IndexedReader(self.path)
        if self.text.data.dtype.kind not in "iu" or self.text.data.dtype.itemsize < 2:
            raise DataError(f"{self.path}.idx: holds {self.text.data.dtype}, not token ids")
        if os.path.exists(self.path + ".json"):
            self.manifest = read_manifest(self.path + ".json")

    def _open_folder(self) -> None:
        manifest = os.path.join(self.path, MANIFEST)
        if not os.path.exists(manifest):
            raise DataError(f"{self.path}: not a dataset folder: it has no {MANIFEST}")
        self.manifest = read_manifest(manifest)
        if self.manifest.get("format") != FORMAT or self.manifest.get("version") != VERSION:
            raise DataError(
                f"{manifest}: format {self.manifest.get('format')!r}, version {self.manifest.get('version')!r}; "
                f"this program reads {FORMAT!r}, version {VERSION}"
            )
        self.text = IndexedReader(os.path.join(self.path, "text"))
        if self.text.data.dtype != np.int32:
            raise DataError(f"{self.path}/text.idx: holds {self.text.data.dtype}; tokens are int32")
        self.table = load_array(os.path.join(self.path, TABLE))
        for kind, name in MEDIA_SHARDS.items():
            prefix = os.path.join(self.path, name)
            if self.manifest.get("counts", {}).get(kind) or os.path.exists(prefix + ".idx"):
                self.media[kind] = IndexedReader(prefix)
                if self.media[kind].data.dtype != np.uint8:
                    raise DataError(f"{prefix}.idx: holds {self.media[kind].data.dtype}; encoded files are uint8")
        if os.path.exists(os.path.join(self.path, "ids.idx")):
            self.ids = IndexedReader(os.path.join(self.path, "ids"))

    def _check_shape(self, table: np.ndarray) -> None:
        path = os.path.join(self.path, TABLE)
        if table.dtype != TABLE_DTYPE or table.ndim != 1:
            raise DataError(f"{path}: has fields {table.dtype.names}, not {TABLE_DTYPE.names}")
        if table.size != len(self.text):
            raise DataError(f"{path}: {table.size} samples, but text.idx has {len(self.text)} documents")
        if self.ids is not None and len(self.ids) != table.size:
            raise DataError(f"{self.path}/ids.idx: {len(self.ids)} ids for {table.size} samples")
        counts = self.manifest.get("counts", {})
        if counts.get("samples", table.size) != table.size:
            raise DataError(f"{self.path}/{MANIFEST}: {counts['samples']} samples, but {TABLE} has {table.size}")

    def check(self) -> None:
        """Checks every row of the indexes and of the table; memory does not grow with the dataset.

        Raises:
            DataError: file, record and what is wrong.
        """
        for reader in (self.text, self.ids, *self.media.values()):
            if reader is not None:
                reader.check()
        if self.table is not None:
            self._check_table(self.table)

    def _check_table(self, table: np.ndarray) -> None:
        path = os.path.join(self.path, TABLE)
        counts: Counter[str] = Counter()
        for start in range(0, table.size, _BLOCK):
            rows = table[start : start + _BLOCK]
            lengths = self.text.document_lengths(np.arange(start, start + rows.size))
            checks = [(rows["num_tokens"] != lengths, "token count differs from text.idx")]
            longer = (rows["prompt_length"] < 0) | (rows["prompt_length"] > rows["num_tokens"])
            checks.append((longer, "prompt longer than text"))
            for kind in KINDS:
                available = len(self.media[kind]) if kind in self.media else 0
                numbers = rows[f"num_{kind}"].astype(np.int64)
                first = rows[_FIRST[kind]]
                wrong = (numbers < 0) | (first < 0) | ((numbers > 0) & (first + numbers > available))
                checks.append((wrong, f"refers beyond the {available} records of {MEDIA_SHARDS[kind]}.idx"))
            for wrong, cause in checks:
                if wrong.any():
                    raise DataError(f"{path}: sample {start + int(np.argmax(wrong))}: {cause}")
            counts.update(table_counts(rows))
        for name, value in self.manifest.get("counts", {}).items():
            if counts.get(name, value) != value:
                raise DataError(f"{self.path}/{MANIFEST}: {value} {name}, but {TABLE} has {counts[name]}")

    def _check_tokenizer(self, tokenizer: Tokenizer) -> None:
        made_by = self.manifest.get("tokenizer", {}).get("identity")
        if made_by is not None and made_by != tokenizer.identity:
            raise DataError(
                f"{self.path}: made with another tokenizer (SHA-256 {made_by[:12]}…) than {tokenizer.path} "
                f"({tokenizer.identity[:12]}…); set data.tokenizer to that model, or build the dataset again"
            )
        data = self.text.data
        for part in (data[:_SCANNED_TOKENS], data[-_SCANNED_TOKENS:]):
            if part.size and not 0 <= int(part.min()) <= int(part.max()) < tokenizer.vocab_size:
                raise DataError(
                    f"{self.text.prefix}.bin: token ids from {int(part.min())} to {int(part.max())}, but "
                    f"{tokenizer.path} has {tokenizer.vocab_size} pieces: made with another tokenizer, or damaged"
                )

    # ------------------------------------------------------------------------------------------------ documents

    def document_lengths(self, documents: np.ndarray | None = None) -> np.ndarray:
        """Tokens of each document, or of those named, int64 [documents]."""
        return self.text.document_lengths(documents)

    def document_length(self, document: int) -> int:
        """Tokens of a document."""
        return self.text.document(document).size

    def column(self, name: str, documents: np.ndarray | None = None) -> np.ndarray:
        """A column of the sample table, or its values of the documents named, int64; zeros for a text shard."""
        if self.table is None:
            return np.zeros(len(self) if documents is None else len(documents), np.int64)
        values = self.table[name] if documents is None else self.table[documents][name]
        return np.asarray(values, dtype=np.int64)

    def prompt_length(self, document: int) -> int:
        """Leading tokens that are not learned."""
        return int(self.table["prompt_length"][document]) if self.table is not None else 0

    def records(self, kind: str, document: int) -> range:
        """Records of a document's media of a kind ('images', 'audios', 'videos')."""
        if self.table is None:
            return range(0)
        row = self.table[document]
        first, number = int(row[_FIRST[kind]]), int(row[f"num_{kind}"])
        if number and not 0 <= first <= first + number <= (len(self.media[kind]) if kind in self.media else 0):
            raise DataError(f"{self.path}/{TABLE}: sample {document}: refers beyond {MEDIA_SHARDS[kind]}.idx")
        return range(first, first + number)

    def medium(self, kind: str, record: int) -> bytes:
        """Encoded bytes of a medium."""
        return self.media[kind].document(record).tobytes()

    def document_id(self, document: int) -> str:
        """The sample's id from the JSONL, or its number."""
        if self.ids is not None:
            name = self.ids.document(document).tobytes().decode(errors="backslashreplace")
            if name:
                return name
        return str(document)

    def describe_record(self, kind: str, record: int, document: int) -> str:
        """How messages name a medium."""
        return f"{self.path}/{MEDIA_SHARDS[kind]}.bin, record {record} (sample {self.document_id(document)})"
