"""Worker processes of the builders: none outlives the process that started it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

#: Starts two workers that take a second to begin, or begin at once, and says so after they were forked.
DRIVER = """
import os, sys, time
from megatron_mm.data import parallel
parent, seconds = os.getpid(), float(sys.argv[1])
plain = parallel.signal.signal
def slow(*arguments):
    if os.getpid() != parent:
        time.sleep(seconds)
    return plain(*arguments)
def tasks():
    yield 0
    yield 1
    print("begun", flush=True)
    time.sleep(60)
parallel.signal.signal = slow
list(parallel.ordered_map(time.sleep, tasks(), 2))
"""


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_workers_end_with_a_parent_that_is_killed(seconds):
    """The parent is killed while its workers wait for work, or before they have begun."""
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(seconds)], stdout=subprocess.PIPE, text=True)
    assert driver.stdout.readline() == "begun\n"
    time.sleep(0.3)
    driver.send_signal(signal.SIGKILL)
    driver.communicate(timeout=30)  # returns once no process holds the pipe any more
