"""SentencePiece models as this project uses them: ordinary pieces plus pad, media placeholders and mask.

`tools/train_tokenizer.py` makes such a model. Every shard records the `identity` of the model that made it, and opening
the shard with another model is refused: ids that mean something else would train without any other sign of error.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import numpy as np
import sentencepiece

from megatron_mm.media.errors import DataError

PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"
IMAGE, AUDIO, VIDEO, MASK = "<image>", "<audio>", "<video>", "<mask>"
#: Placeholder of each medium, by the name of the sample's field that lists its files.
PLACEHOLDERS = {"images": IMAGE, "audios": AUDIO, "videos": VIDEO}


class Tokenizer:
    """A SentencePiece model and the ids of its special tokens.

    Args:
        path: the `.model` file.
        require_media: refuse a model without `<pad>`, the placeholders and `<mask>`. Text-only preprocessing needs
            only `</s>`, so that models made elsewhere work too.

    Raises:
        DataError: the file is missing or no SentencePiece model, or a special token is missing.
    """

    def __init__(self, path: str | os.PathLike[str], require_media: bool = True) -> None:
        self.path = os.fspath(path)
        self.require_media = require_media
        try:
            with open(self.path, "rb") as stream:
                proto = stream.read()
        except OSError as error:
            raise DataError(f"tokenizer {self.path}: cannot be read ({error.strerror})") from error
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except (RuntimeError, OSError) as error:
            raise DataError(f"tokenizer {self.path}: not a SentencePiece model") from error
        self.identity = hashlib.sha256(proto).hexdigest()
        """SHA-256 of the model file: equal if and only if the model is the same."""
        self.vocab_size: int = self.processor.get_piece_size()
        names = (PAD, BOS, EOS, IMAGE, AUDIO, VIDEO, MASK) if require_media else (EOS,)
        missing = [name for name in names if self._id(name) is None]
        if missing:
            raise DataError(
                f"tokenizer {self.path}: lacks the special tokens {', '.join(missing)}; "
                "make one with tools/train_tokenizer.py"
            )
        self.eos_id = self._id(EOS)
        self.pad_id, self.bos_id = self._id(PAD), self._id(BOS)
        self.image_id, self.audio_id = self._id(IMAGE), self._id(AUDIO)
        self.video_id, self.mask_id = self._id(VIDEO), self._id(MASK)

    def __reduce__(self):
        return Tokenizer, (self.path, self.require_media)

    def _id(self, piece: str) -> int | None:
        index = self.processor.piece_to_id(piece)
        return index if self.processor.id_to_piece(index) == piece else None

    @property
    def unlearned_ids(self) -> list[int]:
        """Ids that are never a label that counts: padding and the media placeholders (those the model has)."""
        return [i for i in (self.pad_id, self.image_id, self.audio_id, self.video_id) if i is not None]

    def is_ordinary(self) -> np.ndarray:
        """Whether each id is a piece of text, bool [vocab_size]: not a control token, a placeholder or the mask.

        Nor the bare word boundary, such as SentencePiece writes before every placeholder: it says nothing to be found.
        """
        model, boundary = self.processor, "\u2581"
        special = set(self.unlearned_ids) | {self.bos_id, self.eos_id, self.mask_id}
        return np.array(
            [
                not (i in special or model.is_control(i) or model.is_unknown(i) or model.is_unused(i))
                and model.id_to_piece(i) != boundary
                for i in range(self.vocab_size)
            ]
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS and EOS."""
        return self.processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; control tokens (pad, BOS, EOS) vanish, placeholders stay as written."""
        return self.processor.decode([int(i) for i in ids])
