"""How a command line tool ends: what it prints and leaves when it, or a pool of its own, is terminated."""

from __future__ import annotations

import signal
import subprocess
import textwrap

from tests.support.programs import PYTHON

SCRIPT = """
    import multiprocessing, os, signal, sys, time
    from megatron_mm.data.tool import run_tool

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
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "only the tool's own process has the handler"
