"""SentencePiece models as this project uses them: ordinary pieces plus pad, media placeholders and mask.

`tools/train_tokenizer.py` makes such a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import sentencepiece

from megatron_mm.data.tokens.block_encoder import BlockEncoder
from megatron_mm.data.tokens.tokenizer import AUDIO, BOS, EOS, IMAGE, MASK, PAD, UNK, VIDEO, Tokenizer, json_fields
from megatron_mm.media.errors import DataError


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model and the ids of its special tokens."""

    kind: ClassVar[str] = "sentencepiece"
    reads: ClassVar[str] = "a SentencePiece model, such as tools/train_tokenizer.py makes"
    file_name: ClassVar[str] = "tokenizer.model"
    packages: ClassVar[tuple[str, ...]] = ("sentencepiece",)

    def __init__(self, path: str, content: bytes) -> None:
        self.path = path
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, OSError) as error:
            raise DataError(f"tokenizer {path}: not a SentencePiece model, or a damaged one") from error
        self.identity = hashlib.sha256(content).hexdigest()
        self.vocab_size = self.processor.get_piece_size()
        model = self.processor
        # By the names that this project gives; a model made elsewhere may have other names for what SentencePiece has.
        self.pad_id, self.unk_id = self._id(PAD, model.pad_id()), self._id(UNK, model.unk_id())
        self.bos_id, self.eos_id = self._id(BOS, model.bos_id()), self._id(EOS, model.eos_id())
        self.image_id, self.audio_id = self._id(IMAGE), self._id(AUDIO)
        self.video_id, self.mask_id = self._id(VIDEO), self._id(MASK)

    @staticmethod
    def recognises(content: bytes) -> bool:
        return content[:1] == b"\n" and json_fields(content) is None  # its first field, the pieces; or a line end

    def _id(self, piece: str, other: int = -1) -> int | None:
        index = self.processor.piece_to_id(piece)
        if self.processor.id_to_piece(index) == piece:
            return index
        return other if other >= 0 else None

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if hasattr(self.processor, "encode_as_numpy"):  # from sentencepiece 0.2.3
            return self.processor.encode(list(texts), return_type="numpy", num_threads=1)
        return super().encode_batch(texts)

    def block_encoder(self, eod: int | None) -> BlockEncoder:
        from megatron_mm.data.tokens.word_cache import block_encoder  # imports numba

        return block_encoder(self, eod)

    def prepare(self) -> None:
        from megatron_mm.data.tokens.word_cache import prepare

        prepare(self)

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.decode([int(i) for i in ids])

    def piece(self, index: int) -> str:
        return self.processor.id_to_piece(index)

    def is_ordinary(self) -> np.ndarray:
        """As of every kind, and not the bare word boundary, such as SentencePiece writes before every placeholder: it
        says nothing to be found.
        """
        model, boundary, ordinary = self.processor, "\u2581", super().is_ordinary()
        for i in range(self.vocab_size):
            special = model.is_control(i) or model.is_unknown(i) or model.is_unused(i)
            ordinary[i] &= not special and model.id_to_piece(i) != boundary
        return ordinary
