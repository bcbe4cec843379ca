"""How a command line tool ends: with a message alone, without a traceback, where a user can mend the cause."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from megatron_mm.config.outputs import exit_status


def _keep_from_forks(number: int) -> None:
    """Gives forked workers the default of a signal that this process handles.

    A handler of Python runs between two instructions: a signal just before a worker waits would be seen after the wait,
    which may never end. Blocked during the fork, it meets the worker with its default.
    """

    before: set[int] = set()

    def block() -> None:
        before.clear()
        before.update(signal.pthread_sigmask(signal.SIG_BLOCK, {number}))

    def unblock() -> None:
        if number not in before:  # whoever had it blocked goes on so
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})

    def in_child() -> None:
        if number not in before:
            signal.signal(number, signal.SIG_DFL)
        unblock()

    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=in_child)


def status_of(main: Callable[[], int | None], left: str = "") -> int:
    """Runs a tool's `main` and says on stderr why it did not end well.

    Args:
        left: what there is to say after an interruption that says nothing of its own.

    Returns:
        What `main` returned, 0 for None; 1 after an error that a user can cause, 2 after one of the command itself
        (config/outputs.py); 130 when interrupted.
    """
    try:
        return main() or 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_status(error)
    except KeyboardInterrupt as interruption:
        print(": ".join(filter(None, ("interrupted", str(interruption) or left))), file=sys.stderr)
        return 130


def run_tool(main: Callable[[], int | None], left: str = "nothing was left behind") -> None:
    """Runs a tool's `main` and ends the process with its status (`status_of`).

    A termination is an interruption, so that unfinished output is removed then too, or the interruption says where it
    is.
    """

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    _keep_from_forks(signal.SIGTERM)
    try:
        sys.exit(status_of(main, left))
    finally:
        signal.signal(signal.SIGTERM, before)
