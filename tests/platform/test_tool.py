"""How a command line tool ends: its status, what it says, and what happens when it, or its pool, is terminated."""

from __future__ import annotations

import signal
import subprocess
import textwrap

import pytest

from megatron_mm.config.outputs import OutputError, UsageError
from megatron_mm.platform.tool import run_tool, status_of
from tests.support.programs import PYTHON

SCRIPT = """
    import multiprocessing, os, signal, sys, time
    from megatron_mm.platform.tool import run_tool

    def work(number):
        time.sleep(0.002)
        return number

    def main():
        for _ in range(10):
            with multiprocessing.Pool(2) as pool:  # leaving it terminates the workers
                assert len(list(pool.imap(work, range(20), 4))) == 20
        if sys.argv[1] == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        print("done")

    if __name__ == "__main__":
        run_tool(main)
"""


def run(tmp_path, argument: str) -> subprocess.CompletedProcess:
    script = tmp_path / "tool.py"
    script.write_text(textwrap.dedent(SCRIPT))
    return subprocess.run([PYTHON, script, argument], capture_output=True, encoding="utf-8", check=False)


def test_workers_of_a_pool_end_silently(tmp_path):
    """A forked worker inherits the tool's handler of SIGTERM; it must not raise there."""
    done = run(tmp_path, "finish")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_terminated_tool_says_so(tmp_path):
    done = run(tmp_path, "terminate")
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted: nothing was left behind\n"


def test_who_calls_a_tool_has_the_handler_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        run_tool(lambda: 0 if signal.getsignal(signal.SIGTERM) != before else 5)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("ends", "status", "said"),
    [
        (None, 0, ""),
        (3, 3, ""),
        (ValueError("no such field"), 1, "error: no such field\n"),
        (FileNotFoundError(2, "No such file", "a.json"), 1, "error: [Errno 2] No such file: 'a.json'\n"),
        (UsageError("--steps is 1"), 2, "error: --steps is 1\n"),
        (OutputError("--json /: the root"), 2, "error: --json /: the root\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (KeyboardInterrupt("x keeps it"), 130, "interrupted: x keeps it\n"),
    ],
)
def test_a_status_for_each_way_to_end(ends, status, said, capsys):
    def main():
        if isinstance(ends, BaseException):
            raise ends
        return ends

    assert status_of(main) == status and capsys.readouterr() == ("", said)
    with pytest.raises(RuntimeError):  # nothing that a user can mend: the traceback is for us
        status_of(lambda: (_ for _ in ()).throw(RuntimeError()))


BLOCKED = """
    import os, signal
    from megatron_mm.platform.tool import run_tool

    def main():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        if not os.fork():
            os._exit(signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        print(os.wait()[1], signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    run_tool(main)
"""


def test_a_fork_leaves_blocked_what_its_program_had_blocked():
    """A training program blocks the signals that it takes in a thread, and its readers are not to die of them."""
    done = subprocess.run([PYTHON, "-c", textwrap.dedent(BLOCKED)], capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stdout) == (0, "0 True\n"), done.stderr
