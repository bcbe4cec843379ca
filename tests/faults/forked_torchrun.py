"""torchrun whose ranks are forks of it, so that they start in a second and not in six.

    python -m tests.faults.forked_torchrun INTERPRETER NUMBER_FILE torchrun's words …

What faults meet is as in the field: a rank is a child of the launcher with a session of its own, its signals have
their defaults, it holds no file of the launcher, and what it starts are its own children. What it does not do is
import torch. INTERPRETER is what ranks take for `sys.executable`; this process's number is left in NUMBER_FILE, as the
command that started it may be that of tests/support/warm_python.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from importlib import import_module
from pathlib import Path
from subprocess import Popen
from typing import NoReturn

from tests.support.warm_python.server import IMPORTED, finish

#: Signals that torchrun handles, and a rank does not inherit.
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def _become_rank(words: tuple[str, ...], environment: dict[str, str]) -> NoReturn:
    """Runs a program in a process that was just forked, and ends it as the interpreter would."""
    for number in _HANDLED:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # as the interpreter does when it starts
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
    gc.freeze()  # no object of the launcher is freed here, and closes a file that this process opened since
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.environ.clear()
    os.environ.update(environment)
    finish(list(words[1:]))


def _popen(handler, words: tuple[str, ...], environment: dict[str, str]) -> Popen:
    """In the place of SubprocessHandler._popen: Popen itself forks, and what it forks never becomes another program."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
    try:
        return Popen(
            words,
            stdout=handler._stdout,
            stderr=handler._stderr,
            start_new_session=True,
            preexec_fn=lambda: _become_rank(words, environment),
        )
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)


def main() -> None:
    """See the top."""
    interpreter, number_file, *words = sys.argv[1:]
    Path(number_file).write_text(str(os.getpid()))
    for name in IMPORTED:  # a no-op where this is a fork already
        import_module(name)
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
    from torch.distributed.run import main as torchrun

    sys.executable = interpreter
    subprocess_handler.SubprocessHandler._popen = _popen
    torchrun(words)


if __name__ == "__main__":
    main()
