"""The processes of a run: launcher, ranks, and what ranks started, remembered even when their parents have ended."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable

import psutil

#: In the command line of the process that writes checkpoints in the background.
_WRITER = "checkpoints.writer"


def alive(process: psutil.Process) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def send(processes: Iterable[psutil.Process], number: int) -> list[int]:
    """Sends a signal; returns the numbers of the processes that were there to get it."""
    reached = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)  # nothing to another process that has its number now
            reached.append(process.pid)
    return reached


def _words(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


class Tree:
    """All processes of one launch.

    Args:
        launcher: torchrun's number.
    """

    def __init__(self, launcher: int) -> None:
        self.launcher: psutil.Process | None = None
        with contextlib.suppress(psutil.NoSuchProcess):
            self.launcher = psutil.Process(launcher)
        self.ranks: list[psutil.Process] = []
        """In order of their numbers, also those that have ended."""
        self._others: dict[int, psutil.Process] = {}

    def look(self) -> None:
        """Remembers what there is now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            if self.launcher is not None and alive(self.launcher):
                known = {rank.pid for rank in self.ranks}
                self.ranks += sorted(
                    (child for child in self.launcher.children() if child.pid not in known), key=lambda p: p.pid
                )
        for rank in self.ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in rank.children(recursive=True):
                    self._others.setdefault(child.pid, child)

    def living_ranks(self) -> list[psutil.Process]:
        """Ranks that run."""
        return [rank for rank in self.ranks if alive(rank)]

    def writers(self) -> list[psutil.Process]:
        """Processes that write checkpoints for a rank."""
        return [process for process in self._others.values() if alive(process) and _WRITER in _words(process)]

    def workers(self) -> list[psutil.Process]:
        """Processes that read data for a rank: forks of it, which have its command line."""
        commands = {rank.pid: _words(rank) for rank in self.living_ranks()}
        found = []
        for process in self._others.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                if alive(process) and commands.get(process.ppid()) == _words(process):
                    found.append(process)
        return found

    def known(self) -> list[psutil.Process]:
        """All that ran when it was last looked at, the launcher first."""
        launcher = [self.launcher] if self.launcher is not None else []
        return [*launcher, *self.ranks, *self._others.values()]

    def everything(self) -> list[psutil.Process]:
        """All that run, also those whose parents ended before they were seen."""
        known = self.known()
        sessions, numbers = {rank.pid for rank in self.ranks}, {process.pid for process in known}
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if process.pid not in numbers and os.getsid(process.pid) in sessions:
                    known.append(process)
        return [process for process in known if alive(process)]

    def kill(self) -> list[str]:
        """Ends all that run, and what they start meanwhile; returns their numbers and command lines."""
        said: dict[int, str] = {}
        until = time.monotonic() + 10
        if self.launcher is not None:
            send([self.launcher], signal.SIGSTOP)  # a rank that it starts after it was looked at would be nobody's
        self.look()
        # Not psutil's wait, which would take the launcher's status from who started it.
        while (left := self.everything()) and time.monotonic() < until:
            said |= {process.pid: f"{process.pid} {_words(process)[:80]}" for process in left}
            for number in (signal.SIGKILL, signal.SIGCONT):
                send(left, number)
            time.sleep(0.02)
            self.look()
        return list(said.values())
