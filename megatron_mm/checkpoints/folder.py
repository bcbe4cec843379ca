"""Checkpoint folders on disk: named by iteration, whole or not there, newest first, old ones removed.

A checkpoint is written as `iter_0000100.part`; `finish` records every file's size in `manifest.json` and renames it, so
a folder without `.part` was whole when it was written, and `verify` finds what was cut off later. What is removed holds
files of a checkpoint and nothing else: a folder of that name with something of the user's in it stays. No torch here:
conversion tools and the trainer share it.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from contextlib import suppress
from pathlib import Path

from megatron_mm.data.tokens.tokenizer import tokenizer_kinds
from megatron_mm.platform.atomic_files import give_name, write_whole

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
TRACKER = "latest_checkpointed_iteration.txt"
#: What is written into a checkpoint, at its top, besides the tokenizer.
_FILES = re.compile(r"[^/]+\.distcp|\.metadata(\.tmp)?|common\.pt|metadata\.json|config\.yaml|manifest\.json")


def folder_of(root: str | Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration stands."""
    return Path(root) / f"iter_{iteration:07d}"


def begin(root: str | Path, iteration: int) -> Path:
    """An empty folder to write a checkpoint into; a leftover of an interrupted write is removed.

    Raises:
        ValueError: what would be replaced, now or by `finish`, is not a checkpoint's.
    """
    folder, tracker = folder_of(root, iteration), Path(root, TRACKER)
    if tracker.is_file() and (named := tracker.read_text().strip()) and not named.isdigit():
        raise ValueError(f"{tracker} names no iteration, so it is another program's; choose another folder")
    part = folder.with_suffix(".part")
    for path in (folder, folder.with_suffix(".old")):
        _check_removable(path)
    remove(part)
    part.mkdir(parents=True)
    return part


def remove(folder: Path) -> None:
    """Removes a checkpoint, whole or not, if there is one.

    Raises:
        ValueError: there is something else; nothing was removed.
    """
    _check_removable(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _check_removable(folder: Path) -> None:
    """Raises ValueError unless a folder holds files of a checkpoint alone, or is not there."""
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise ValueError(f"{folder} is no folder of a checkpoint, so it stays; move it away")
    listed = {kind.file_name for kind in tokenizer_kinds()}
    with suppress(OSError, ValueError, LookupError, TypeError):
        listed |= set(json.loads((folder / MANIFEST).read_text())["files"])
    names = (str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if not path.is_dir())
    other = next((name for name in names if name not in listed and not _FILES.fullmatch(name)), None)
    if other is not None:
        raise ValueError(f"{folder} holds {other}, which is no part of a checkpoint, so it stays; move it away")


def finish(part: Path, facts: dict | None = None) -> Path:
    """Records file sizes, renames `iter_….part` to `iter_…` and points the tracker at it."""
    files = {str(path.relative_to(part)): path.stat().st_size for path in sorted(part.rglob("*")) if path.is_file()}
    (part / MANIFEST).write_text(json.dumps({**(facts or {}), "files": files}, indent=1))
    folder = part.with_suffix("")
    aside = folder.with_suffix(".old")
    if folder.exists():  # an abandoned branch's: set aside until the new one stands
        _check_removable(folder)
        remove(aside)
    if give_name(part, folder, aside):
        remove(aside)
    write_whole(folder.parent / TRACKER, str(iteration_of(folder)))
    return folder


def iteration_of(folder: Path) -> int:
    """Iteration of a checkpoint folder.

    Raises:
        ValueError: the folder is not named iter_NNNNNNN.
    """
    prefix, _, digits = folder.name.partition("_")
    if prefix != "iter" or not digits.isdigit():
        raise ValueError(f"{folder} is not a checkpoint folder (iter_0000100)")
    return int(digits)


def recorded_iteration(folder: Path) -> int:
    """Iteration that the manifest of a whole checkpoint records."""
    return json.loads((folder / MANIFEST).read_text())["iteration"]


def checkpoints(root: str | Path) -> list[Path]:
    """Finished checkpoint folders, oldest first."""
    found = [path for path in Path(root).glob("iter_*") if path.is_dir() and path.name.partition("_")[2].isdigit()]
    return sorted(found, key=iteration_of)


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None: files are compared with the manifest by size."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"{folder} has no readable {MANIFEST}"
    for name, size in files.items():
        path = folder / name
        actual = path.stat().st_size if path.exists() else None
        if actual != size:
            return f"{path} has {actual} bytes instead of {size}" if actual is not None else f"{path} is missing"
    return None


def newest_whole(root: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with newer ones."""
    problems = []
    for folder in reversed(checkpoints(root)):
        problem = verify(folder)
        if problem is None:
            return folder, problems
        problems.append(problem)
    return None, problems


def resolve(path: str | Path) -> Path:
    """A checkpoint folder from itself or from the folder that holds checkpoints.

    Raises:
        ValueError: nothing there, or nothing whole.
    """
    path = Path(path)
    if (path / MANIFEST).exists():
        problem = verify(path)
        if problem:
            raise ValueError(problem)
        return path
    folder, problems = newest_whole(path)
    if folder is None:
        raise ValueError("; ".join(problems) or f"{path} holds no checkpoint (iter_NNNNNNN)")
    return folder


def prune(root: str | Path, keep: int, newest: int) -> None:
    """Removes all but the newest `keep` whole checkpoints up to an iteration, the one just written (0 keeps all).

    Later ones (of a branch that was left by loading an earlier checkpoint), damaged ones and those of another iteration
    than their name says are not counted or touched; those that hold something of the user's stay.
    """
    if keep > 0:
        upto = [folder for folder in checkpoints(root) if iteration_of(folder) <= newest]
        whole = [path for path in upto if verify(path) is None and recorded_iteration(path) == iteration_of(path)]
        for folder in whole[:-keep]:
            try:
                remove(folder)
            except ValueError as error:
                logger.warning("an old checkpoint is not removed: %s", error)


def set_aside_later(root: str | Path, iteration: int) -> list[Path]:
    """Renames checkpoints after an iteration to `iter_….abandoned`: a run goes on from that iteration instead.

    Raises:
        ValueError: something that is no checkpoint has such a name.
    """
    moved = []
    for folder in checkpoints(root):
        if iteration_of(folder) > iteration:
            target = folder.with_suffix(".abandoned")
            remove(target)
            folder.rename(target)
            moved.append(target)
    return moved
