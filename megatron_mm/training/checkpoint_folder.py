"""Checkpoint folders on disk: named by iteration, whole or not there, newest first, old ones removed.

A checkpoint is written as `iter_0000100.part`; `finish` records every file's size in `manifest.json` and renames it, so
a folder without `.part` was whole when it was written, and `verify` finds what was cut off later. No torch here:
conversion tools and the trainer share it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

MANIFEST = "manifest.json"
TRACKER = "latest_checkpointed_iteration.txt"


def folder_of(root: str | Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration stands."""
    return Path(root) / f"iter_{iteration:07d}"


def begin(root: str | Path, iteration: int) -> Path:
    """An empty folder to write a checkpoint into; a leftover of an interrupted write is removed."""
    part = folder_of(root, iteration).with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part


def finish(part: Path, facts: dict | None = None) -> Path:
    """Records file sizes, renames `iter_….part` to `iter_…` and points the tracker at it."""
    files = {str(path.relative_to(part)): path.stat().st_size for path in sorted(part.rglob("*")) if path.is_file()}
    (part / MANIFEST).write_text(json.dumps({**(facts or {}), "files": files}, indent=1))
    folder = part.with_suffix("")
    if folder.exists():  # an abandoned branch's: set aside until the new one stands
        aside = folder.with_suffix(".old")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        part.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        part.rename(folder)
    tracker = folder.parent / TRACKER
    temporary = tracker.with_suffix(".tmp")
    temporary.write_text(str(iteration_of(folder)))
    temporary.replace(tracker)
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

    Later ones (of a branch that was left by loading an earlier checkpoint) and damaged ones are not counted or touched.
    """
    if keep > 0:
        whole = [folder for folder in checkpoints(root) if iteration_of(folder) <= newest and verify(folder) is None]
        for folder in whole[:-keep]:
            shutil.rmtree(folder, ignore_errors=True)


def set_aside_later(root: str | Path, iteration: int) -> list[Path]:
    """Renames checkpoints after an iteration to `iter_….abandoned`: a run goes on from that iteration instead."""
    moved = []
    for folder in checkpoints(root):
        if iteration_of(folder) > iteration:
            target = folder.with_suffix(".abandoned")
            shutil.rmtree(target, ignore_errors=True)
            folder.rename(target)
            moved.append(target)
    return moved
