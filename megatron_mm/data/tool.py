"""How a command line tool ends: with a message alone, without a traceback, where a user can mend the cause; and how it
loads what a user names by --plugins."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_mm.config.outputs import exit_status
from megatron_mm.config.plugins import load_plugin


def _keep_from_forks(number: int) -> None:
    """Gives forked workers the default of a signal that this process handles.

    A handler of Python runs between two instructions: a signal just before a worker waits would be seen after the wait,
    which may never end. Blocked during the fork, it meets the worker with its default.
    """

    def in_child() -> None:
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})

    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {number}),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, {number}),
        after_in_child=in_child,
    )


def load_plugins(names: Sequence[str]) -> None:
    """Imports what --plugins names, before workers are forked.

    Raises:
        ValueError: there is no such file or module.
    """
    for name in names:
        load_plugin(name, Path(), "--plugins")


def run_tool(main: Callable[[], int | None]) -> None:
    """Runs a tool's `main` and ends the process: 0, 1 after an error a user can cause, 2 if an output is no place for
    one or another's, 130 when interrupted or terminated, so that unfinished output is removed then too, or the
    interruption says where it is."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    _keep_from_forks(signal.SIGTERM)
    try:
        status = main() or 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = exit_status(error)
    except KeyboardInterrupt as interruption:
        print(f"interrupted: {str(interruption) or 'nothing was left behind'}", file=sys.stderr)
        status = 130
    sys.exit(status)
