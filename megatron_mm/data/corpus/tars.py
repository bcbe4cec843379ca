"""WebDataset tars → JSON lines: members with the same name up to the first dot, one after another, are a sample.

`.txt` and `.caption` are its "text", `.json` has further fields, images, sounds and videos are its media in the order
of the tar (`7.0.png` and `7.1.png` are two of sample `7`); other endings and hidden files are passed over. The name is
the "id" if `.json` has none. Members are read as they come and never written to the disk.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from megatron_mm.data.corpus.record_lines import inline_medium, record_line, with_placeholders
from megatron_mm.data.corpus.samples import parse_line
from megatron_mm.media.errors import DataError

_KINDS = {
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"), "images"),
    **dict.fromkeys((".wav", ".flac", ".mp3", ".ogg", ".opus"), "audios"),
    **dict.fromkeys((".mp4", ".webm", ".mkv", ".mov", ".avi"), "videos"),
    **dict.fromkeys((".txt", ".caption"), "text"),
    ".json": "fields",
}
_LONG_NAMES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
               tarfile.GNUTYPE_LONGLINK)  # fmt: skip
_LONGEST_NAME = 1 << 20


class _Header(tarfile.TarInfo):
    """Refuses what tarfile forgives: a damaged header, which it takes for the end, and names that fill the memory."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        is_end = len(buf) == tarfile.BLOCKSIZE and not buf.strip(b"\0")
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if is_end:
                raise
            raise tarfile.ReadError(str(error) if buf else "it is cut off") from error
        if header.type in _LONG_NAMES and header.size > _LONGEST_NAME:
            raise tarfile.ReadError(f"a name of {header.size} bytes")
        return header


def tar_lines(path: str, stream: BinaryIO, max_line: int) -> Iterator[bytes]:
    """JSON lines of a tar.

    Raises:
        DataError: the tar is damaged, or a member cannot be used; it is named.
    """
    room = max_line * 3 // 4  # base64 takes four bytes for three
    name, members, size = "", {}, 0
    try:
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as archive:
            while member := archive.next():
                archive.members.clear()  # tarfile would keep every header
                where = f"{path}: {member.name}"
                _refuse(member, where)
                folder, base = os.path.split(os.path.normpath(member.name))
                stem, dot, endings = base.partition(".")
                kind = _KINDS.get(os.path.splitext("_" + dot + endings)[1].lower())
                if member.isdir() or not stem or kind is None:
                    continue
                if os.path.join(folder, stem) != name:
                    yield from _sample(name, members)
                    name, members, size = os.path.join(folder, stem), {}, 0
                size += member.size
                if size > room:
                    raise DataError(f"{where}: with it, sample {name} has {size} bytes; it may have at most {room}")
                data = archive.extractfile(member).read()  # type: ignore[union-attr]
                if kind in ("text", "fields") and kind in members:
                    raise DataError(f"{where}: another member is the {kind} of sample {name} already")
                if kind == "text":
                    members[kind] = _utf8(data, where)
                elif kind == "fields":
                    members[kind] = parse_line(data, where)
                else:
                    members.setdefault(kind, []).append(inline_medium(data))
            yield from _sample(name, members)
    except tarfile.TarError as error:
        raise DataError(f"{path}: damaged tar, after sample {name or 'none'} ({error})") from error


def _refuse(member: tarfile.TarInfo, where: str) -> None:
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise DataError(f"{where}: a member's path must stay inside the tar")
    if not (member.isdir() or member.isreg()) or member.issparse() or member.size < 0:
        raise DataError(f"{where}: a link, device or sparse file; only plain files can be used")


def _sample(name: str, members: dict) -> Iterator[bytes]:
    if members:
        record = {"id": name, **members.pop("fields", {}), **members}
        yield record_line(with_placeholders(record))


def _utf8(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
