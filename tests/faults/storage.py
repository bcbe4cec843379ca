"""Faults of the storage that a run writes to: full, without inodes, read-only, or failing in the middle of a file.

The first three need a small tmpfs of their own in the place of a folder, which root may mount and mount again with
other options while it is in use. A write that fails in the middle is a limit on the size of files, set on running
processes: a write beyond it fails (EFBIG).
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import time
from pathlib import Path

import psutil

#: Size of a whole tmpfs: more than all checkpoints that a run keeps.
_WHOLE = {"size": str(256 << 20), "nr_inodes": "100000"}


def can_mount() -> bool:
    """Whether this process may mount a tmpfs."""
    return os.geteuid() == 0 and shutil.which("mount") is not None and _has_capability()


def _has_capability() -> bool:
    """CAP_SYS_ADMIN, which root of a container may lack."""
    with contextlib.suppress(OSError, StopIteration):
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff"))
        return bool(int(line.split()[1], 16) & (1 << 21))
    return False


class SmallDisk:
    """A tmpfs mounted on a folder, which is made; `close` unmounts it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        _mount("-t", "tmpfs", "-o", ",".join(f"{name}={value}" for name, value in _WHOLE.items()), "none", str(folder))

    def _again(self, *options: str) -> None:
        _mount("-o", ",".join(["remount", *options]), str(self.folder))

    def fill(self, free: int) -> None:
        """Leaves about so many bytes free."""
        state = os.statvfs(self.folder)
        used = (state.f_blocks - state.f_bfree) * state.f_frsize
        self._again(f"size={used + max(4096, free)}")

    def take_inodes(self, free: int) -> None:
        """Leaves so many files that may be made."""
        state = os.statvfs(self.folder)
        self._again(f"nr_inodes={state.f_files - state.f_ffree + free}")

    def lock(self, seconds: float = 3.0) -> None:
        """Makes it read-only, as soon as no file in it is open for writing.

        Raises:
            OSError: one was for so long.
        """
        until = time.monotonic() + seconds
        while True:
            try:
                return self._again("ro")
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.005)

    def mend(self) -> None:
        """As it was at first."""
        self._again("rw", *(f"{name}={value}" for name, value in _WHOLE.items()))

    def close(self) -> None:
        """Unmounts it; what it holds is gone."""
        unmount(self.folder)


def _mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise OSError(f"mount {' '.join(words)}: {done.stderr.strip()}")


def unmount(folder: Path) -> None:
    """Unmounts a folder, though files in it may be open."""
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


def mounted_below(folder: Path) -> list[Path]:
    """Where something is mounted in a folder, such as by a campaign that was killed."""
    targets = [Path(line.split()[1]) for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [target for target in targets if folder.resolve() in target.parents]


def limit_files(processes: list[psutil.Process], largest: int) -> None:
    """Lets processes, and what they start, write no file beyond a size in bytes; -1: any."""
    limit = resource.RLIM_INFINITY if largest < 0 else largest
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
