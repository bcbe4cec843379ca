"""Lock files (locks/): exact releases of environments, a line `name==version` each, sorted by name.

    python tools/locks.py clean [--without LOCK] [--keep NAME] <RESOLUTION   what a resolver printed, as a lock file
    python tools/locks.py changes OLD NEW                                    what differs between two lock files
    python tools/locks.py installed LOCK                                     how this environment differs from one

torch is in no lock but its own (locks/torch.txt), so that a build for CPUs or for another CUDA can take its place; nor
are the libraries that only some of its builds bring. Needs nothing but Python: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)")
#: torch, and what its builds for CUDA bring.
_TORCH = re.compile(r"torch|triton|nvidia-.*|cuda-.*")

#: In every environment and in no lock: this package, and the pip that Python brings.
_OURS = {"megatron-mm", "pip"}


class LockError(ValueError):
    """A lock file that is none; names file, line and what was expected."""


def normalized(name: str) -> str:
    """The name of a package as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read(lines: Iterable[str], where: str) -> dict[str, str]:
    """Version by normalized name.

    Args:
        lines: lines of a lock file.
        where: what an error calls them.

    Raises:
        LockError: a line is not `name==version`, or a name comes twice.
    """
    releases: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise LockError(f"{where}, line {number}: {line.strip()!r} is not name==version")
        name = normalized(match[1])
        if name in releases:
            raise LockError(f"{where}, line {number}: {name} is named twice")
        releases[name] = match[2]
    return releases


def read_file(path: Path) -> dict[str, str]:
    """`read` of a file; one that does not exist is an empty lock."""
    return read(path.read_text().splitlines(), str(path)) if path.exists() else {}


def without_torch(releases: dict[str, str], keep: Iterable[str] = ()) -> dict[str, str]:
    """The releases but torch and what only its builds for CUDA bring, of which those named in `keep` stay."""
    kept = set(keep)
    return {name: version for name, version in releases.items() if name in kept or not _TORCH.fullmatch(name)}


def changes(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """One line for every package whose release differs, sorted by name."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if before is None:
            lines.append(f"{name} {after} (added)")
        elif after is None:
            lines.append(f"{name} {before} (removed)")
        elif before != after:
            lines.append(f"{name} {before} -> {after}")
    return lines


def installed() -> dict[str, str]:
    """Version by normalized name of what this interpreter can import and a lock could name."""
    present = {normalized(each.name): each.version for each in metadata.distributions()}
    return without_torch({name: present[name] for name in present.keys() - _OURS})


def _print_lock(releases: dict[str, str]) -> None:
    for name in sorted(releases):
        print(f"{name}=={releases[name]}")


def _print_changes(heading: str, lines: list[str]) -> None:
    print(f"{heading}: {len(lines) or 'no'} change{'' if len(lines) == 1 else 's'}")
    for line in lines:
        print(f"    {line}")


def main(words: list[str] | None = None) -> int:
    """Runs one of the commands above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    clean = commands.add_parser("clean", help="what a resolver printed, as a lock file")
    clean.add_argument("--without", type=Path, help="a lock whose releases are left out: they lie beneath")
    clean.add_argument("--keep", action="append", default=[], help="a package of torch's that stays")
    compare = commands.add_parser("changes", help="what differs between two lock files")
    compare.add_argument("old", type=Path)
    compare.add_argument("new", type=Path)
    here = commands.add_parser("installed", help="how this environment differs from a lock file")
    here.add_argument("lock", type=Path)
    arguments = parser.parse_args(words)
    try:
        if arguments.command == "clean":
            resolved = without_torch(read(sys.stdin, "the resolver's output"), arguments.keep)
            left_out = read_file(arguments.without) if arguments.without else {}
            _print_lock({name: version for name, version in resolved.items() if left_out.get(name) != version})
        elif arguments.command == "changes":
            _print_changes(str(arguments.old), changes(read_file(arguments.old), read_file(arguments.new)))
        else:
            _print_changes(f"{arguments.lock} -> installed", changes(read_file(arguments.lock), installed()))
    except LockError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
