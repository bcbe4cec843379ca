"""What a tokenizer is to this project, the kinds that there are, and which of them reads a file.

    file ─ open_tokenizer ─ the kind that recognises its content ─ Tokenizer ─ builders, training, evaluation, export

A recipe or a tool names a file, and the content says of which kind it is: a SentencePiece model, or the JSON of another
kind. Each kind is one file that derives a class from `Tokenizer`; a plugin adds its own by `register_tokenizer`.

Every shard records the `identity` of the tokenizer that made it, and opening the shard with another one is refused: ids
that mean something else would train without any other sign of error.
"""

from __future__ import annotations

import os
import pkgutil
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from megatron_mm.config.documents import parse_json
from megatron_mm.data.tokens.block_encoder import BlockEncoder, DirectEncoder
from megatron_mm.media.errors import DataError
from megatron_mm.media.files import read_file

#: Longest file of a tokenizer; the largest vocabularies in use take 20 MB.
_LARGEST = 1 << 28
PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"
IMAGE, AUDIO, VIDEO, MASK = "<image>", "<audio>", "<video>", "<mask>"
#: Roles of special tokens, and how texts and messages spell them.
ROLES = {
    "pad": PAD, "unk": UNK, "bos": BOS, "eos": EOS, "image": IMAGE, "audio": AUDIO, "video": VIDEO, "mask": MASK,
}  # fmt: skip
#: Placeholder of each medium, by the name of the sample's field that lists its files.
PLACEHOLDERS = {"images": IMAGE, "audios": AUDIO, "videos": VIDEO}


class Tokenizer(Protocol):
    """Text to ids and back, and the ids of special tokens. A kind derives from this class, and is made of a file.

    Args:
        path: the file.
        content: its bytes.

    Raises:
        DataError: the content is damaged; names the file.
    """

    kind: ClassVar[str]
    """Name of the kind."""
    reads: ClassVar[str]
    """What its files are, for the message about a file that no kind reads."""
    file_name: ClassVar[str]
    """What checkpoints and exported folders call a copy of the file; no other kind has it."""
    exported_names: ClassVar[tuple[str, ...]] = ()
    """Names of `exported_files`."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Packages without which an exported folder's tokenizer does not load, besides transformers and Pillow."""

    path: str
    """The file."""
    identity: str
    """SHA-256: equal if and only if the tokenizer is the same."""
    vocab_size: int
    """Ids are below it."""
    pad_id: int | None
    unk_id: int | None
    bos_id: int | None
    eos_id: int | None
    image_id: int | None
    audio_id: int | None
    video_id: int | None
    mask_id: int | None
    """Ids of special tokens by role (`ROLES`); None where there is none."""

    @abstractmethod
    def __init__(self, path: str, content: bytes) -> None: ...

    @staticmethod
    @abstractmethod
    def recognises(content: bytes) -> bool:
        """Whether a file of this content is of this kind, perhaps damaged."""
        ...

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS and EOS. A placeholder or the mask, written out, is its one id."""
        ...

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; control tokens (pad, BOS, EOS) vanish, placeholders stay as written.

        Raises:
            IndexError: an id that the tokenizer does not have.
        """
        ...

    @abstractmethod
    def piece(self, index: int) -> str:
        """How an id is shown by itself."""
        ...

    # ------------------------------------------------------------ what follows from these, unless a kind knows better

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32."""
        return [np.array(self.encode(text), dtype=np.int32) for text in texts]

    def block_encoder(self, eod: int | None) -> BlockEncoder:
        """The fastest encoder of many texts whose ids are those of `encode`."""
        return DirectEncoder(self, eod)

    def prepare(self) -> None:
        """Makes what block encoders need and keep: worker processes that are forked afterwards find it."""

    @property
    def placeholder_ids(self) -> dict[str, int]:
        """Ids of the placeholders that there are, by the name of the sample's field."""
        ids = {"images": self.image_id, "audios": self.audio_id, "videos": self.video_id}
        return {kind: index for kind, index in ids.items() if index is not None}

    @property
    def unlearned_ids(self) -> list[int]:
        """Ids that are never a label that counts: padding and the media placeholders (those that there are)."""
        return [i for i in (self.pad_id, *self.placeholder_ids.values()) if i is not None]

    def is_ordinary(self) -> np.ndarray:
        """Whether each id is a piece of text, bool [vocab_size]: not a control token, a placeholder or the mask."""
        ordinary = np.ones(self.vocab_size, bool)
        ordinary[[i for i in (getattr(self, f"{role}_id") for role in ROLES) if i is not None]] = False
        return ordinary

    def exported_files(self) -> dict[str, bytes]:
        """Files of an exported folder beside the copy of `path`, by name.

        With them `AutoTokenizer` loads the folder's tokenizer in a process that has not this package. None are needed
        where `hf/processing_mm.py` reads the file itself.
        """
        return {}

    def __reduce__(self):
        return open_tokenizer, (self.path, False)


#: The kinds by name, each a class derived from `Tokenizer`, or `module:name` of it, which is imported when it is asked
#: for.
_KINDS: dict[str, type[Tokenizer] | str] = {
    "sentencepiece": "megatron_mm.data.tokens.sentencepiece_tokenizer:SentencePieceTokenizer",
    "bytes": "megatron_mm.data.tokens.byte_tokenizer:ByteTokenizer",
}


def tokenizer_kinds() -> list[type[Tokenizer]]:
    """The kinds that there are, in the order in which they are asked."""
    return [pkgutil.resolve_name(kind) if isinstance(kind, str) else kind for kind in _KINDS.values()]


def register_tokenizer(kind: type[Tokenizer]) -> None:
    """Adds a kind of a user's own.

    Raises:
        ValueError: it lacks something that a kind must have, or its name, or that of its file, is taken.
    """
    missing = {name for name in ("kind", "reads", "file_name") if not hasattr(kind, name)}
    if missing := sorted(missing | getattr(kind, "__abstractmethods__", frozenset())):
        raise ValueError(f"the kind of tokenizer {kind.__name__} lacks {', '.join(missing)}")
    for other in tokenizer_kinds():
        if other.kind == kind.kind:
            raise ValueError(f"there is already a kind of tokenizer {kind.kind!r}")
        if other.file_name == kind.file_name:
            raise ValueError(f"the kind of tokenizer {other.kind!r} already calls its file {kind.file_name}")
    _KINDS[kind.kind] = kind


def open_tokenizer(path: str | os.PathLike[str], require_media: bool = True) -> Tokenizer:
    """The tokenizer of a file.

    Args:
        path: a file that a kind reads.
        require_media: refuse a tokenizer without `<pad>`, the placeholders and `<mask>`. Text-only preprocessing needs
            only `</s>`, so that tokenizers made elsewhere work too.

    Raises:
        DataError: the file is missing, damaged or of no known kind, or a special token is missing.
    """
    content = _content(path)
    tokenizer = _kind_of(path, content)(os.fspath(path), content)
    roles = ("pad", "bos", "eos", "image", "audio", "video", "mask") if require_media else ("eos",)
    missing = [ROLES[role] for role in roles if getattr(tokenizer, f"{role}_id") is None]
    if missing:
        raise DataError(
            f"tokenizer {path}: lacks the special tokens {', '.join(missing)}; make one with tools/train_tokenizer.py"
        )
    return tokenizer


def tokenizer_kind(path: str | os.PathLike[str]) -> type[Tokenizer]:
    """The kind of a file, which is not read further.

    Raises:
        DataError: the file is missing, or of no known kind.
    """
    return _kind_of(path, _content(path))


def stored_name(path: str | os.PathLike[str]) -> str:
    """What a checkpoint calls its copy of a tokenizer's file.

    A file of no known kind, which a user's own `data.builder` reads and nothing here, is called as it always was.
    """
    try:
        return tokenizer_kind(path).file_name
    except DataError:
        return "tokenizer.model"


def tokenizer_in(folder: str | os.PathLike[str]) -> Path | None:
    """The tokenizer that a checkpoint or an exported folder holds; None: it holds none of a known kind."""
    files = (Path(folder, kind.file_name) for kind in tokenizer_kinds())
    return next((file for file in files if file.exists()), None)


def kind_named(file_name: str) -> type[Tokenizer]:
    """The kind whose file has this name in a checkpoint or an exported folder."""
    return next(kind for kind in tokenizer_kinds() if kind.file_name == file_name)


def json_fields(content: bytes, kind: str | None = None) -> Mapping[str, object] | None:
    """Fields of the JSON object `{"kind": …}`, by which small files name a kind; None: the content is no such thing.

    Args:
        kind: which it must be; None: any.
    """
    try:
        fields = parse_json(content)
    except ValueError:
        return None
    named = isinstance(fields, dict) and isinstance(fields.get("kind"), str)
    return fields if named and kind in (None, fields["kind"]) else None


def _content(path: str | os.PathLike[str]) -> bytes:
    try:
        return read_file(path, _LARGEST)
    except OSError as error:
        raise DataError(f"tokenizer {path}: cannot be read ({error.strerror})") from error
    except DataError as error:
        raise DataError(f"tokenizer {error}") from error


def _kind_of(path: str | os.PathLike[str], content: bytes) -> type[Tokenizer]:
    for kind in tokenizer_kinds():
        if kind.recognises(content):
            return kind
    if (fields := json_fields(content)) is not None:
        raise DataError(
            f"tokenizer {path}: is of the kind {fields['kind']!r}; known kinds: {', '.join(_KINDS)} (a plugin that "
            "registers another is named by plugins of the recipe, or --plugins)"
        )
    raise DataError(f"tokenizer {path}: not {', nor '.join(kind.reads for kind in tokenizer_kinds())}")
