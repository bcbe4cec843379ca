"""The moments of a run at which faults strike, found by what the run writes: marks, figures and the checkpoint folder.

starting    a while after the launch
loading     a while after a process opened the data: building, loading, or the first step
stepping    a while after so many more steps
validating  a while after a process read a microbatch of validation
saving      a few milliseconds after the folder of an unfinished checkpoint appeared
copying     a few milliseconds after a file in it has bytes
renaming    when its manifest is there, the last file before it gets its name
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from megatron_mm.checkpoints.folder import MANIFEST
from tests.faults.training import Launch, files_of, finished_checkpoints, iteration

#: Longest while of each moment, in seconds.
_LONGEST = {
    "starting": 1.5,
    "loading": 0.5,
    "stepping": 0.2,
    "validating": 0.1,
    "saving": 0.1,
    "copying": 0.05,
    "renaming": 0.001,
}
ANY = tuple(_LONGEST)
OF_A_SAVE = ("saving", "copying", "renaming")
#: Of a run that has begun.
LATER = tuple(name for name in ANY if name not in ("starting", "loading"))


@dataclass(frozen=True)
class Moment:
    """When a fault strikes.

    Args:
        name: from the list above.
        after: how many steps or saves are left to pass before, counted from when the moment is waited for.
        seconds: of the while.
    """

    name: str
    after: int
    seconds: float

    def __str__(self) -> str:
        return self.name


def draw_moment(dice: random.Random, among: Collection[str] = ANY) -> Moment:
    """One of some moments; those of a save, which are short, as often as all others."""
    of_a_save, others = [[name for name in among if (name in OF_A_SAVE) == wanted] for wanted in (True, False)]
    name = dice.choice(of_a_save if not others or (of_a_save and dice.random() < 0.5) else others)
    after = dice.randint(1, 7) if name == "stepping" else dice.randint(0, 2) if name in OF_A_SAVE else 0
    return Moment(name, after, round(dice.random() * _LONGEST[name], 4))


def wait_for(moment: Moment, launch: Launch) -> str:
    """Waits until a moment has come: "there"; or "ended" or "hung", as `Launch.watch`."""
    came = launch.watch(_sign(moment, launch), pause=0.0003 if moment.name in OF_A_SAVE else 0.002)
    if came == "there":
        time.sleep(moment.seconds)
    return came


def _sign(moment: Moment, launch: Launch) -> Callable[[], bool]:
    """Whether the moment begins."""
    if moment.name == "starting":
        return lambda: bool(launch.tree.ranks)
    if moment.name == "stepping":
        wanted = iteration(launch.output) + moment.after  # of what stands there from before, too
        metrics = launch.output / "metrics.jsonl"
        return _changes(lambda: _size(metrics), lambda: iteration(launch.output) >= wanted)
    if moment.name in ("loading", "validating"):
        mark = launch.marks / ("opened" if moment.name == "loading" else "validated")
        before = _size(mark) if moment.name == "validating" else 0
        return lambda: _size(mark) > before
    return _Save(moment, launch.root)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _changes(value: Callable[[], object], there: Callable[[], bool]) -> Callable[[], bool]:
    """Asks `there()` only when a value that costs less has changed."""
    last: list[object] = [None]

    def asked() -> bool:
        if (now := value()) == last[0]:
            return False
        last[0] = now
        return there()

    return asked


class _Save:
    """The moment within a save, after as many other saves as the moment says."""

    def __init__(self, moment: Moment, root: Path) -> None:
        self.name, self.left, self.root = moment.name, moment.after, root
        self._part: str | None = None
        self._ignored = set(self._parts())  # leftovers that no process fills
        self._inodes = {name: self._inode(name) for name in self._ignored}
        self._last: set[str] = set()

    def _parts(self) -> list[str]:
        try:
            return [name for name in os.listdir(self.root) if name.startswith("iter_") and name.endswith(".part")]
        except OSError:
            return []

    def _inode(self, name: str) -> int:
        try:
            return (self.root / name).stat().st_ino
        except OSError:
            return 0

    def __call__(self) -> bool:
        """Whether it is now."""
        parts = [n for n in self._parts() if n not in self._ignored or self._inode(n) != self._inodes[n]]
        if not parts:
            if self._part is not None:
                self._part, self.left = None, self.left - 1
            return False
        if self._part != parts[-1]:
            self._part = parts[-1]
            newest = max(finished_checkpoints(self.root).items(), default=None)
            self._last = {MANIFEST} | ({_last_file(newest[1])} if newest else set())
        return self.left <= 0 and self._within(self.root / self._part)

    def _within(self, part: Path) -> bool:
        if self.name == "saving":
            return True
        if self.name == "renaming":
            return any((part / name).exists() for name in self._last)
        try:
            return any(entry.stat().st_size for entry in os.scandir(part))
        except OSError:
            return False


def _last_file(folder: Path) -> str:
    """Name of the file of a checkpoint that was written last before its manifest."""
    try:
        written = [(path.stat().st_mtime_ns, path) for path in files_of(folder) if path.name != MANIFEST]
    except OSError:  # it is removed meanwhile
        return MANIFEST
    return str(max(written)[1].relative_to(folder)) if written else MANIFEST
