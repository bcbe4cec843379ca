"""The error of everything that reads or writes data, and how a command line tool ends with it.

A data error is the user's to fix (a damaged shard, a bad line, a wrong option), so its message names the file, the
record and the cause, and a tool prints that message alone, without a traceback.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable


class DataError(ValueError):
    """Input that cannot be used; the message names the file, the record and what would be right."""


def run_tool(main: Callable[[], int | None]) -> None:
    """Runs a tool's `main` and ends the process: 0, 1 after an error a user can cause, 130 when interrupted or
    terminated, so that unfinished output is removed then too, or the interruption says where it is."""
    owner = os.getpid()

    def interrupt(number: int, _frame: object) -> None:
        if os.getpid() != owner:  # a worker forked with this handler ends as if it had none
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        status = main() or 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt as interruption:
        print(f"interrupted: {str(interruption) or 'nothing was left behind'}", file=sys.stderr)
        status = 130
    sys.exit(status)
