"""Builds that are killed at random moments and started again until one comes to its end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.programs import PYTHON
from tests.support.waiting import wait_until

#: Begins the program of each build: a journal after every block, and no end of a build that is to be killed. A fast
#: machine, or one on which the test itself waits for a processor, might otherwise be done before the kill comes.
_PRELUDE = """
import os, signal
from megatron_mm.data.jobs import unfinished

def hold(build, *_):
    open(build.folder + ".held", "w").close()
    while True:
        signal.pause()

unfinished.JOURNAL_SECONDS = -1
if os.environ["HELD"]:
    unfinished.UnfinishedBuild.place = hold
"""


def start(program: str, *words: object, held: bool = False) -> subprocess.Popen:
    """Starts Python on a program that builds; standard error is a pipe of text.

    Args:
        held: when all is built but for the names, a file appears beside the folder of the unfinished build, with its
            name and `.held`, and the process waits for a signal.
    """
    command = [PYTHON, "-c", _PRELUDE + program, *map(str, words)]
    environment = {**os.environ, "HELD": "yes" if held else ""}
    return subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8", env=environment)


def undisturbed(program: str, *words: object) -> str:
    """What an undisturbed build said, which came to its end."""
    process = start(program, *words)
    _, said = process.communicate()
    assert process.returncode == 0, said
    return said


def kill_and_continue(
    program: str, words: Callable[[int], list[object]], building: Path, kills: int, pause: float = 0.0
) -> list[str]:
    """Kills the first builds with SIGKILL, each a random while after it went on with its journal; the next must end.

    Args:
        words: arguments of the program at the attempt of this number, from 0.
        building: folder of the unfinished build.
        kills: how many builds are killed.
        pause: seconds, the longest while.

    Returns:
        What each attempt said.
    """
    dice, said = random.Random(0), []
    journal, held = building / "journal.json", building.with_name(building.name + ".held")

    def written() -> bytes:
        return journal.read_bytes() if journal.exists() else b""

    for attempt in range(kills):
        before = written()
        held.unlink(missing_ok=True)
        process = start(program, *words(attempt), held=True)
        try:
            wait_until(lambda: held.exists() or written() != before, "the build goes on", process)  # noqa: B023
        except AssertionError as error:
            process.kill()
            raise AssertionError(f"attempt {attempt}: {error}\n{process.communicate()[1]}") from error
        time.sleep(dice.random() * pause)
        process.send_signal(signal.SIGKILL)
        said.append(process.communicate()[1])
        assert process.returncode == -signal.SIGKILL, said[-1]
    return [*said, undisturbed(program, *words(kills))]
