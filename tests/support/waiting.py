"""How tests get on with what runs beside them: they wait for a state, never for as long as a machine should need.

What a test waits for comes after a second here and after minutes where many processes share a core. The only limit is
one that ends a test which would wait for ever, and no machine on which the tests are of use reaches it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable

#: Seconds after which what a test waits for counts as hung. Whole runs of the suite take less.
HANG_SECONDS = 1800.0


def wait_until(there: Callable[[], object], what: str, process: subprocess.Popen | None = None) -> None:
    """Returns once `there()` is true.

    Args:
        there: looks for the state.
        what: the state, for the message of a test that fails.
        process: brings the state about; the wait ends with it.
    """
    until = time.monotonic() + HANG_SECONDS
    while not there():
        ended = process is not None and process.poll() is not None
        assert not ended or there(), f"{what}: its process ended with {process.returncode} before"
        assert time.monotonic() < until, f"{what}: not within {HANG_SECONDS:.0f} s"
        time.sleep(0.01)


def free_ports(count: int) -> int:
    """The first of so many consecutive ports that nothing listens on, below those that the system gives to others.

    Each process looks in another order, so that what two of them start at the same time does not meet.
    """
    runs = range(20000, 32000 - count, count)
    for number in range(len(runs)):
        first = runs[(os.getpid() + number) % len(runs)]
        try:
            for port in range(first, first + count):
                with socket.create_server(("", port)):
                    pass
        except OSError:
            continue
        return first
    raise AssertionError(f"no {count} consecutive ports are free")
