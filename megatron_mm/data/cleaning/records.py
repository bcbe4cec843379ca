"""A record while it is judged: its fields, its text, and its media, read and decoded when something asks for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image

from megatron_mm.data.corpus.samples import KINDS, media_entries, parse_line, read_entry, text_field
from megatron_mm.media.decoding import check_medium, decode_image, decode_sound, decode_video
from megatron_mm.media.errors import DataError

Measured = TypeVar("Measured")


class Media:
    """The media of one record, in order.

    Args:
        entries: paths or inline media of each kind.
        root: folder to which paths are relative; None: the record's file holds its media (`corpus/text_input.py`).
        where: "file, line n", for messages.

    Every property raises DataError, naming the medium, where a file is missing or does not decode.
    """

    def __init__(self, entries: dict[str, list], root: str | None, where: str) -> None:
        self._entries, self._root, self._where = entries, root, where
        self._bytes: dict[str, list[bytes]] = {}

    def __bool__(self) -> bool:
        return any(self._entries.values())

    def count(self, kind: str) -> int:
        """How many "images", "audios" or "videos" there are."""
        return len(self._entries[kind])

    def files(self, kind: str) -> list[bytes]:
        """Encoded files of a kind."""
        if kind not in self._bytes:
            self._bytes[kind] = [
                read_entry(kind, entry, number, self._root, self._where, check=False)
                for number, entry in enumerate(self._entries[kind], 1)
            ]
        return self._bytes[kind]

    def _decoded(self, kind: str, decode: Callable[[bytes], Measured]) -> list[Measured]:
        out = []
        for number, data in enumerate(self.files(kind), 1):
            try:
                out.append(decode(data))
            except DataError as error:
                entry = self._entries[kind][number - 1]
                name = f": {entry}" if isinstance(entry, str) else ""
                raise DataError(f'{self._where}: field "{kind}", number {number}{name}: {error}') from error
        return out

    @functools.cached_property
    def images(self) -> list[Image.Image]:
        """Decoded, RGB."""
        return self._decoded("images", decode_image)

    @functools.cached_property
    def sounds(self) -> list[tuple[np.ndarray, int]]:
        """(mono samples, float32 [n]; Hz)."""
        return self._decoded("audios", decode_sound)

    def frames(self, count: int) -> list[list[Image.Image]]:
        """`count` evenly spaced frames of each video, RGB."""
        return self._decoded("videos", lambda data: decode_video(data, count))

    def measure_videos(self, measure: Callable[[bytes], Measured]) -> list[Measured]:
        """What a function says of each video's file; its DataErrors are named."""
        return self._decoded("videos", measure)

    def check(self) -> None:
        """Decodes all once, as the builders do."""
        _ = self.images, self.sounds
        self._decoded("videos", lambda data: check_medium("videos", data))


class Record:
    """One parsed line.

    Args:
        line: the JSON object.
        where: "file, line n", for messages.
        text_keys: its texts; all must be there but "prompt", which is optional.
        media_root: folder to which paths of media are relative; None: there are none.

    Raises:
        DataError: the line cannot be used.
    """

    def __init__(self, line: bytes, where: str, text_keys: tuple[str, ...], media_root: str | None) -> None:
        self.where = where
        self.fields = parse_line(line, where)
        has_prompt = self.fields.get("prompt") is not None
        self.prompt = text_field(self.fields, "prompt", where) if has_prompt else ""
        keys = (key for key in text_keys if key != "prompt" or has_prompt)
        self.text = "\n".join(text_field(self.fields, key, where) for key in keys)
        texts = [value for key in ("prompt", "text") if isinstance(value := self.fields.get(key), str)]
        entries = media_entries(self.fields, texts, where) if any(self.fields.get(kind) for kind in KINDS) else None
        self.media = Media(entries or {kind: [] for kind in KINDS}, media_root, where)
