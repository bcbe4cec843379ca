"""What a training process does when it is told to stop, or when the launcher that started it is gone.

SIGTERM and SIGINT come from schedulers, launchers and terminals, SIGUSR1 from Slurm before a time limit (--signal).
They are blocked in every thread, and one thread waits for them, so that a process hears of a signal while its main
thread is in an import or in a collective. Children inherit the mask: readers of data do not die of a signal to the
whole node, and what is to end a child is SIGKILL.

    the process starts → `install` → … first step … `remember` → all ranks agree → `remembered_by_all` → … steps …
      a signal ends the process at once, nothing is saved     |        a signal is remembered: `asked`

A second SIGTERM or SIGINT ends the process at once. Schedulers signal every process of a node, and the launcher passes
on its own, so one cause arrives twice: what comes within `ECHO_SECONDS` is an echo, and so is the launcher's first.
SIGUSR1 is a notice: it asks for the same end, but it never hurries, and the SIGTERM that follows it at the time limit
is a first one.

Imported before anything else of a program, so it needs the standard library alone.
"""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import threading
import time
from typing import NoReturn

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
#: Seconds within which signals have one cause. A scheduler's loop over the processes of a node takes less.
ECHO_SECONDS = 2.0
#: Seconds that a process which was told to stop before the first step waits for its own end, so that the others have
#: got their signals before they lose it in a collective.
TOGETHER_SECONDS = 0.5
#: Seconds that a process waits for the first agreement of all once it was told to stop: another may have ended before.
AGREEMENT_SECONDS = 10.0
#: Seconds that a process whose launcher is gone may take to save what a signal has asked for.
ORPHAN_SECONDS = 120.0


class _Stage(enum.Enum):
    STARTING = "nothing is saved"
    AGREEING = "this process has done its first step, another one perhaps not"
    RUNNING = "every process has"


class _Signals:
    """The signals of this process, from its start to its end.

    Args:
        numbers: which are waited for.
        launcher: number of the process that passes its own signals on; None: there is none.
    """

    def __init__(self, numbers: set[signal.Signals], launcher: int | None) -> None:
        self.asked: signal.Signals | None = None
        self.stage = _Stage.STARTING
        self._numbers, self._launcher, self._process = numbers, launcher, os.getpid()
        self._demanded: dict[bool, float] = {}
        """When SIGTERM or SIGINT first came, from the launcher (True) and from others."""
        # The handler below may interrupt the main thread while that holds it.
        self._lock = threading.RLock()

    def start(self) -> None:
        """Blocks the signals in this thread and all that it starts, and waits for them in another."""
        self.block()
        os.register_at_fork(before=self.block)
        for number in self._numbers:
            signal.signal(number, self._unblocked)
        threading.Thread(target=self._wait, daemon=True, name="signals").start()
        if self._launcher is not None:
            threading.Thread(target=self._watch_launcher, daemon=True, name="launcher").start()

    def block(self) -> None:
        """Blocks the signals in this thread, and so in the children that it forks.

        Again and again: multiprocessing unblocks SIGINT and SIGTERM in a thread that starts its resource tracker.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)

    def _unblocked(self, number: int, _frame: object) -> None:
        """Takes a signal in the main thread, where a library has unblocked it."""
        self.block()
        if os.getpid() == self._process:  # a child inherits this handler
            self._take(signal.Signals(number), None)

    def _wait(self) -> None:
        while True:
            if hasattr(signal, "sigwaitinfo"):
                info = signal.sigwaitinfo(self._numbers)
                self._take(signal.Signals(info.si_signo), info.si_pid)
            else:  # macOS, which does not say who has sent it
                self._take(signal.Signals(signal.sigwait(self._numbers)), None)

    def _take(self, number: signal.Signals, sender: int | None) -> None:
        with self._lock:
            if number != signal.SIGUSR1 and self._is_second(sender is not None and sender == self._launcher):
                say(f"{_rank_word()}: a second signal, {number.name}: it ends at once")
                exit_at_once(128 + number)
            if self.asked is not None:
                return
            self.asked = number
            if self.stage is _Stage.STARTING:
                self.end_unsaved()
            if _rank() == 0:
                say(
                    f"{number.name}: the run ends when the step in hand is done and saved "
                    f"(another one, after {ECHO_SECONDS:.0f} s or more, ends it at once)"
                )
            if self.stage is _Stage.AGREEING:
                timer = threading.Timer(AGREEMENT_SECONDS, self._end_if_not_agreed)
                timer.daemon = True
                timer.start()

    def _is_second(self, of_launcher: bool) -> bool:
        """Whether SIGTERM or SIGINT is no echo of an earlier one. Takes note of the first ones."""
        now = time.monotonic()
        # The launcher passes on, late perhaps, what others have sent; nobody else passes on what it sends.
        times = [at for side, at in self._demanded.items() if side or not of_launcher]
        self._demanded.setdefault(of_launcher, now)
        return bool(times) and now - min(times) > ECHO_SECONDS

    def _end_if_not_agreed(self) -> None:
        with self._lock:
            if self.stage is _Stage.AGREEING:
                self.end_unsaved()

    def end_unsaved(self) -> NoReturn:
        """Ends the process with status 0. The lock is held for ever, so that it takes part in no agreement."""
        with self._lock:
            if _rank() == 0:
                name = self.asked.name if self.asked else "a signal"
                say(f"stopped by {name} before the first step: nothing is saved")
            if os.environ.get("WORLD_SIZE", "1") != "1":
                time.sleep(TOGETHER_SECONDS)
            exit_at_once(0)

    def enter(self, stage: _Stage) -> None:
        """Goes on to a stage, unless the process is ending."""
        with self._lock:
            self.stage = stage

    def _watch_launcher(self) -> None:
        while os.getppid() == self._launcher:
            time.sleep(1.0)
        time.sleep(1.0)  # what ended the launcher may be on its way to this process too
        if self.asked is not None:
            say(f"{_rank_word()}: its launcher is gone; it ends when it has saved, within {ORPHAN_SECONDS:.0f} s")
            time.sleep(ORPHAN_SECONDS)
        say(f"error: {_rank_word()}: its launcher (process {self._launcher}) is gone, so it ends; nothing is saved")
        exit_at_once(1)


_signals: _Signals | None = None


def install() -> None:
    """Takes over the signals of this process, and watches its launcher where torchrun is one. Main thread only.

    It is called before any other thread exists. A signal that the process was told to ignore stays ignored.
    """
    global _signals
    launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
    numbers = {number for number in NUMBERS if signal.getsignal(number) != signal.SIG_IGN}
    _signals = _Signals(numbers, launcher)
    _signals.start()


def is_installed() -> bool:
    """Whether signals are taken in this process: the training program's is the only one."""
    return _signals is not None


def asked() -> signal.Signals | None:
    """The signal that told this process to stop; None: there was none."""
    return _signals.asked if _signals else None


def remember() -> None:
    """From here on a signal is remembered. It does not return where one has come before."""
    if _signals:
        _signals.block()
    if _signals and _signals.stage is _Stage.STARTING:
        _signals.enter(_Stage.AGREEING)


def remembered_by_all() -> None:
    """Says that every process of the run has called `remember`, so that what is remembered will be agreed upon."""
    if _signals and _signals.stage is _Stage.AGREEING:
        _signals.enter(_Stage.RUNNING)


def end_as_told(within_seconds: float) -> None:
    """Ends the process with status 0 if a signal has come before the first step, or comes within so many seconds.

    For a process that has lost others in a collective: a signal may have ended those first. Returns at once where
    signals are not taken, or after the first step.
    """
    until = time.monotonic() + within_seconds
    while _signals and _signals.stage is not _Stage.RUNNING:
        if _signals.asked is not None:
            _signals.end_unsaved()
        if time.monotonic() > until:
            return
        time.sleep(0.05)


def exit_at_once(status: int) -> NoReturn:
    """Ends this process and what it started (readers, checkpoint writers), without joining any collective.

    An orderly exit would wait for ranks that may themselves be waiting.
    """
    try:
        import psutil

        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    finally:
        os._exit(status)


def say(line: str) -> None:
    """Writes a line to standard error, whatever another thread holds."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _rank_word() -> str:
    return f"rank {_rank()}"
