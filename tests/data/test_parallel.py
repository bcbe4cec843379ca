"""Worker processes of the builders: none outlives the process that started it."""

from __future__ import annotations

import signal
import subprocess

import pytest

from tests.support.programs import INTERPRETER
from tests.support.waiting import HANG_SECONDS

#: Starts two workers, which say that they wait for work, or which do not begin before their parent has ended.
DRIVER = """
import os, signal, sys, time
from megatron_mm.data.jobs import parallel
parent, when = os.getpid(), sys.argv[1]
plain = parallel.signal.signal
def late(*arguments):
    while when == "before" and os.getpid() != parent == os.getppid():
        time.sleep(0.01)
    return plain(*arguments)
def begun():
    print("waiting", flush=True)
def tasks():
    yield 0
    yield 0
    if when == "before":
        print("forked\\nforked", flush=True)
    signal.pause()
parallel.signal.signal = late
list(parallel.ordered_map(time.sleep, tasks(), 2, begun))
"""


@pytest.mark.parametrize(("when", "said"), [("after", "waiting"), ("before", "forked")])
def test_workers_end_with_a_parent_that_is_killed(when, said):
    """The parent is killed while its workers wait for work, or before they have begun."""
    driver = subprocess.Popen([INTERPRETER, "-c", DRIVER, when], stdout=subprocess.PIPE, encoding="utf-8")
    assert [driver.stdout.readline() for _ in range(2)] == [f"{said}\n"] * 2
    driver.send_signal(signal.SIGKILL)
    driver.communicate(timeout=HANG_SECONDS)  # returns once no process holds the pipe any more
