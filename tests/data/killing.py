"""Builds that are killed at random moments and started again until one comes to its end."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def kill_and_continue(
    start: Callable[[int], subprocess.Popen], journal: Path, is_done: Callable[[], bool], kills: int, pause: float
) -> list[str]:
    """Kills the first builds with SIGKILL, each a random while after it went on with its journal.

    Args:
        start: starts the attempt of this number, from 0; standard error is a pipe of text.
        journal: of the unfinished build.
        is_done: whether the output is there: a kill may come after all is done.
        kills: how many builds are killed.
        pause: seconds, the longest while.

    Returns:
        What each attempt said.
    """
    dice, said = random.Random(0), []
    for attempt in range(40):
        before = journal.read_bytes() if journal.exists() else b""
        build = start(attempt)
        while build.poll() is None and (journal.read_bytes() if journal.exists() else before) == before:
            time.sleep(0.002)
        time.sleep(dice.random() * pause)
        if attempt < kills:
            build.send_signal(signal.SIGKILL)
        _, stderr = build.communicate(timeout=120)
        said.append(stderr)
        if build.returncode == 0 or is_done():
            return said
        assert build.returncode == -signal.SIGKILL, stderr
    raise AssertionError(f"no build came to its end; the last said {said[-1]}")
