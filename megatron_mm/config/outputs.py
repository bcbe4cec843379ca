"""Outputs that a user names: none is written where there is no place for one, none replaces what is not of its kind.

A path may be what an unset variable of a script left of it, and a name may be taken by something of the user's own. So
an output is looked at before the work begins, which may take days: a file is replaced if what it holds is of the kind
that is written, a folder of results is taken up if it has a marker of the program that makes it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

#: Of a folder of results: the program that makes it, which replaces what it wrote there before.
MARKER = ".megatron_mm-output"
_STREAMS = re.compile(r"/dev/(stdout|stderr|fd/\d+)|/proc/self/fd/\d+")
_LARGEST_FIGURES = 1 << 26  # bytes; what is longer are no figures of ours


class UsageError(ValueError):
    """A mistake in the command, which ends with status 2."""


class OutputError(UsageError):
    """An output that is not written or replaced."""


def exit_status(error: Exception) -> int:
    """Status that a program ends with after an error that its user can mend: 2 for a mistake in the command, else 1."""
    return 2 if isinstance(error, UsageError) else 1


@dataclass(frozen=True)
class Kind:
    """A kind of files, known by what they hold."""

    name: str
    holds: Callable[[str], bool]
    """Whether the file of a path is of this kind; what it raises on reading means that it is not."""

    def includes(self, path: str | os.PathLike[str]) -> bool:
        """Whether a file is of this kind, or empty."""
        try:
            return os.path.getsize(path) == 0 or self.holds(os.fspath(path))
        except Exception:
            return False


def figures(*keys: str) -> Kind:
    """JSON: an object with these keys, or a list of such."""

    def holds(path: str) -> bool:
        value = read_figures(path)
        return all(isinstance(item, dict) and keys_of <= item.keys() for item in _listed(value))

    keys_of = frozenset(keys)
    return Kind(f"figures ({', '.join(keys)}) as JSON", holds)


def read_figures(path: str) -> object:
    """The JSON of a file of figures. Raises ValueError where it is too long to be one."""
    if os.path.getsize(path) > _LARGEST_FIGURES:
        raise ValueError(f"{path}: too long for figures")
    with open(path, encoding="utf-8") as stream:
        return json.load(stream)


def _listed(value: object) -> list:
    return value if isinstance(value, list) else [value]


def records(*keys: str) -> Kind:
    """JSONL whose first line is an object with these keys."""

    def holds(path: str) -> bool:
        with open(path, encoding="utf-8", errors="replace") as stream:
            record = json.loads(stream.readline(_LARGEST_FIGURES))
        return isinstance(record, dict) and frozenset(keys) <= record.keys()

    return Kind(f"JSONL with {', '.join(keys)}", holds)


def check_place(path: str | os.PathLike[str], option: str) -> None:
    """Raises OutputError for a path that is empty (as a Path, also for ".") or a root."""
    text = os.fspath(path)
    if not text or path == Path():
        raise OutputError(f"{option} is empty; is the variable set from which it comes?")
    if os.path.dirname(place := os.path.realpath(text)) == place:
        raise OutputError(f"{option} {text}: the root is no place for an output")


def check_file(path: str | os.PathLike[str] | None, option: str, kind: Kind) -> None:
    """Raises OutputError unless a file of a kind can be written at a path, and replaces at most one of that kind.

    Args:
        path: None, where the user named none.
    """
    if path is None:
        return
    check_place(path, option)
    text = os.fspath(path)
    if os.path.isdir(text):
        raise OutputError(f"{option} {text}: is a folder; name a file")
    if is_stream(text):
        return
    above = os.path.dirname(os.path.realpath(text))
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        raise OutputError(f"{option} {text}: {above} is no folder")
    if not os.access(above, os.W_OK):
        raise OutputError(f"{option} {text}: {above} cannot be written")
    if os.path.isfile(text) and not kind.includes(text):
        raise OutputError(f"{option} {text}: holds something else than {kind.name}, and is not replaced; name another")


def is_stream(path: str) -> bool:
    """Whether nothing is lost by writing there: a terminal, a pipe, what the shell put in place of one."""
    return bool(_STREAMS.fullmatch(path)) or (os.path.exists(path) and not os.path.isfile(path))


def begin_folder(path: Path, maker: str, option: str, is_earlier: Callable[[Path], bool]) -> None:
    """Makes a folder of results, or takes up one that the same program made.

    Args:
        maker: the program, as the marker names it.
        option: by which the user named the folder.
        is_earlier: whether a folder without marker is one of an earlier version, which left none.

    Raises:
        OutputError: the folder is no place for results, or of another program, or not empty and the user's own.
    """
    check_place(path, option)
    if os.path.lexists(path) and not path.is_dir():
        raise OutputError(f"{option} {path}: is no folder")
    marker = path / MARKER
    others = sorted(set(os.listdir(path)) - {MARKER}) if path.is_dir() else []
    owner = marker.read_text(encoding="utf-8").strip() if marker.is_file() else ""
    if owner not in ("", maker):
        raise OutputError(f"{option} {path}: is a folder of {owner}, not of {maker}; name another")
    if not owner:
        if others and not is_earlier(path):
            raise OutputError(
                f"{option} {path}: holds {others[0]} and no {MARKER} of {maker}, which would replace what it finds; "
                "name another folder"
            )
        path.mkdir(parents=True, exist_ok=True)
        marker.write_text(f"{maker}\n", encoding="utf-8")  # if it is cut off, the folder is as new
