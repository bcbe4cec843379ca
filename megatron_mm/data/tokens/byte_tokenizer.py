"""UTF-8 bytes as tokens: nothing is trained, nothing is unknown, every text comes back as it was.

Its file is the JSON object `{"kind": "bytes"}`. The special tokens have the ids that tools/train_tokenizer.py gives
them, and byte b is id 8 + b.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from megatron_mm.data.tokens.tokenizer import AUDIO, BOS, EOS, IMAGE, MASK, PAD, ROLES, VIDEO, Tokenizer, json_fields
from megatron_mm.media.errors import DataError

_SPECIAL = list(ROLES.values())
_FIRST = len(_SPECIAL)
#: Special tokens that a text may have; the others are made by builders alone, and their names in a text are bytes.
_WRITTEN = re.compile(f"({'|'.join((IMAGE, AUDIO, VIDEO, MASK))})")
_CONTROL = frozenset(_SPECIAL.index(name) for name in (PAD, BOS, EOS))
#: What loads it in a process without this package, copied as it is.
_PORTABLE = Path(__file__).parents[2] / "hf" / "tokenization_bytes.py"


def _ids(part: str) -> np.ndarray:
    """Ids of a special token, or of text without any, int32."""
    if _WRITTEN.fullmatch(part):
        return np.array([_SPECIAL.index(part)], np.int32)
    return np.frombuffer(part.encode(), np.uint8).astype(np.int32) + np.int32(_FIRST)


class ByteTokenizer(Tokenizer):
    """256 bytes behind eight special tokens."""

    kind: ClassVar[str] = "bytes"
    reads: ClassVar[str] = 'the JSON object {"kind": "bytes"}'
    file_name: ClassVar[str] = "byte_tokenizer.json"

    def __init__(self, path: str, content: bytes) -> None:
        self.path = path
        fields = json_fields(content, self.kind)
        unknown = sorted(set(fields) - {"kind"})
        if unknown:
            raise DataError(f"tokenizer {path}: the kind {self.kind!r} has no field {unknown[0]!r}; it has kind alone")
        self.identity = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
        self.vocab_size = _FIRST + 256
        self.pad_id, self.unk_id, self.bos_id, self.eos_id = range(4)
        self.image_id, self.audio_id, self.video_id, self.mask_id = range(4, _FIRST)

    @staticmethod
    def recognises(content: bytes) -> bool:
        return json_fields(content, ByteTokenizer.kind) is not None

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.concatenate([_ids(part) for part in _WRITTEN.split(text)]) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """As of every kind; bytes that are no UTF-8 become U+FFFD."""
        out = bytearray()
        for i in map(int, ids):
            if not 0 <= i < self.vocab_size:
                raise IndexError(f"{i} is no id of a byte tokenizer, whose ids are below {self.vocab_size}")
            if i >= _FIRST:
                out.append(i - _FIRST)
            elif i not in _CONTROL:
                out += _SPECIAL[i].encode()
        return out.decode(errors="replace")

    def piece(self, index: int) -> str:
        if index < _FIRST:
            return _SPECIAL[index]
        byte = index - _FIRST
        return chr(byte) if 33 <= byte < 127 else f"<0x{byte:02X}>"

    exported_names: ClassVar[tuple[str, ...]] = (_PORTABLE.name, "tokenizer_config.json")

    def exported_files(self) -> dict[str, bytes]:
        module = _PORTABLE.stem
        fields = {
            "tokenizer_class": "ByteTokenizer",
            "auto_map": {"AutoTokenizer": [f"{module}.ByteTokenizer", None]},
        }
        written = (json.dumps(fields, indent=2) + "\n").encode()
        return dict(zip(self.exported_names, (_PORTABLE.read_bytes(), written)))
