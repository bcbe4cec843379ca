"""Many texts → one array of ids: what the text builder asks of a tokenizer, and how any kind answers it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from megatron_mm.data.tokens.tokenizer import Tokenizer


class BlockEncoder(Protocol):
    """Encodes texts; `eod` ends each text that has tokens, unless None."""

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts back to back (int32), and the length of each (int32)."""


class DirectEncoder:
    """The tokenizer's own encoding of whole texts."""

    def __init__(self, tokenizer: Tokenizer, eod: int | None) -> None:
        self._encode = tokenizer.encode_batch
        self._eod = np.array([] if eod is None else [eod], dtype=np.int32)

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        documents = self._encode(texts)
        lengths = np.fromiter(map(len, documents), np.int32, len(documents))
        parts = chain.from_iterable((ids, self._eod) if ids.size else (ids,) for ids in documents)
        lengths += (lengths > 0) * np.int32(self._eod.size)
        return np.concatenate([np.empty(0, np.int32), *parts]).astype(np.int32, copy=False), lengths
