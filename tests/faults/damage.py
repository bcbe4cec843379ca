"""What befalls a checkpoint folder between two launches: a damaged file, or leftovers of something unfinished.

Files are taken as they come, whatever a checkpoint is made of.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from tests.faults.training import SAVE_EVERY, files_of, finished_checkpoints

WAYS = ("truncated", "bit flipped", "zeroed", "swapped", "missing")
LEFTOVERS = ("part of the next", "part of this", "old of this")


def _files(folder: Path) -> list[Path]:
    return [path for path in files_of(folder) if path.stat().st_size]


def damage(folder: Path, way: str, dice: random.Random, other: Path | None) -> str | None:
    """Damages one file of a checkpoint; returns which and how, or None where nothing can be damaged so.

    Args:
        folder: of the checkpoint.
        way: one of WAYS.
        dice: draws file and place; files of all sizes are as likely.
        other: a checkpoint of another iteration, for "swapped".
    """
    files = _files(folder)
    dice.shuffle(files)
    for path in files:
        before = path.read_bytes()
        after = _damaged(before, way, dice, other / path.relative_to(folder) if other else None)
        if after == before:
            continue
        if after is None:
            path.unlink()
        else:
            path.write_bytes(after)
        return f"{folder.name}/{path.relative_to(folder)} {way}"
    return None


def _damaged(before: bytes, way: str, dice: random.Random, other: Path | None) -> bytes | None:
    """What a file holds after; None: it is gone."""
    if way == "missing":
        return None
    if way == "truncated":
        return before[: dice.randrange(len(before))]
    if way == "bit flipped":
        place = dice.randrange(len(before))
        return before[:place] + bytes([before[place] ^ (1 << dice.randrange(8))]) + before[place + 1 :]
    if way == "zeroed":
        place = dice.randrange(max(1, len(before) - 4096))
        return before[:place] + bytes(len(before[place : place + 4096])) + before[place + 4096 :]
    return other.read_bytes() if other is not None and other.is_file() else before


def leave(root: Path, newest: Path, what: str, dice: random.Random) -> str:
    """Leaves a folder that an interrupted save might have left; returns its name.

    Args:
        root: folder of checkpoints.
        newest: one of them.
        what: one of LEFTOVERS.
        dice: draws which files are missing or cut.
    """
    number = max(finished_checkpoints(root)) + (SAVE_EVERY if what == "part of the next" else 0)
    target = root / f"iter_{number:07d}.{'old' if what.startswith('old') else 'part'}"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(newest, target)
    if target.suffix == ".part":
        for path in _files(target):
            if dice.random() < 0.5:
                path.write_bytes(path.read_bytes()[: dice.randrange(path.stat().st_size)])
            elif dice.random() < 0.3:
                path.unlink()
    return target.name
