"""Files and folders that get their name once they are whole.

After a kill, a file is as it was before, with a leftover beside it. A folder is not replaced in one step: a kill
between two renames leaves the old one whole, under the name it has aside.

    PATH.PID.partial ─ written, closed ─ PATH                    written_whole, write_whole, write_figures
    a folder beside it, filled ─ the old one aside ─ its name    give_name

A file whose data must outlive the machine, not the process alone, is also synced.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from megatron_mm.config.outputs import is_stream

AnyPath = str | os.PathLike[str]


@contextmanager
def written_whole(
    path: AnyPath, mode: str = "x", *, partial: AnyPath | None = None, durable: bool = False, **how: str
) -> Iterator[IO]:
    """A file to write, which gets its name, and replaces what has it, once it is whole.

    Links are followed; a device or a pipe, such as /dev/stdout, is written as it is.

    Args:
        mode: "x" or "xb".
        partial: its name until then, where that name is the program's own: what a killed process left there is
            replaced. None: a name of this process, beside `path`; a file that has it is another's, and an error.
        durable: on the disk before it gets its name.
        how: encoding and the like.
    """
    if is_stream(os.fspath(path)):
        with open(path, mode.replace("x", "w"), **how) as stream:
            yield stream
        return
    target = os.path.realpath(path)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if partial is None:
        partial = f"{target}.{os.getpid()}.partial"
    else:
        mode = mode.replace("x", "w")
    with open(partial, mode, **how) as stream:
        try:
            yield stream
            if durable:
                sync(stream)
            stream.close()
            give_name(partial, target)
        except BaseException:
            with suppress(FileNotFoundError):
                os.remove(partial)
            raise


def write_whole(path: AnyPath, text: str) -> None:
    """Writes text, whole or not at all."""
    with written_whole(path, encoding="utf-8") as stream:
        stream.write(text)


def write_figures(path: AnyPath | None, value: object, indent: int = 2) -> None:
    """Writes figures as JSON, if the user named a file for them."""
    if path is not None:
        write_whole(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def sync(stream: IO) -> None:
    """Returns when all that was written is on the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(path: AnyPath) -> None:
    """Returns when the names in a folder are on the disk, where its file system can tell."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def give_name(made: AnyPath, final: AnyPath, aside: AnyPath | None = None) -> bool:
    """Renames what is whole to its name, on the same file system. A file replaces a file.

    Args:
        aside: where a folder that has the name goes first, as a folder replaces none that holds something; it goes back
            where the new one cannot have the name.

    Returns:
        whether a folder is aside now, which the caller removes.
    """
    replaces = aside is not None and os.path.isdir(final)
    if replaces:
        os.rename(final, aside)
    try:
        os.replace(made, final)
    except BaseException:
        if replaces:
            os.rename(aside, final)
        raise
    return replaces
