"""The command of tests/support/warm_python does what the interpreter does. Truth: the interpreter, given the same."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.programs import INTERPRETER, PYTHON
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(INTERPRETER == PYTHON, reason="this session has no server of programs")

SAY = """
import json, os, signal, sys
print(json.dumps({
    "argv": sys.argv, "path": sys.path[0], "cwd": os.getcwd(), "variable": os.environ.get("OF_A_TEST"),
    "name": __name__, "others": "PYTEST_CURRENT_TEST" in os.environ, "read": sys.stdin.read(), "umask": os.umask(0o22),
    "ignored": signal.getsignal(signal.SIGTERM) == signal.SIG_IGN,
    "files": sorted(int(name) for name in os.listdir("/proc/self/fd"))[:4],
}))
print("to the other", file=sys.stderr)
sys.exit(7)
"""


def both(tmp_path: Path, words: list[str], **options) -> list[tuple[int, object, str]]:
    """(status, what the program says of itself, standard error) by the interpreter and by the command."""
    found = []
    for python in (INTERPRETER, PYTHON):
        done = subprocess.run([python, *words], capture_output=True, encoding="utf-8", cwd=tmp_path, **options)
        found.append((done.returncode, json.loads(done.stdout), done.stderr))
    return found


@pytest.mark.parametrize("how", ["-c", "-m", "script", "-u"])
def test_it_is_called_as_the_interpreter_is(how, tmp_path):
    (tmp_path / "says.py").write_text(SAY)
    first = {"-c": ["-c", SAY], "-m": ["-m", "says"], "script": ["says.py"], "-u": ["-u", "says.py"]}[how]
    environment = {**os.environ, "OF_A_TEST": "ä ö"}
    del environment["PYTEST_CURRENT_TEST"]
    options = {"input": "asked", "env": environment, "umask": 0o27}
    real, warm = both(tmp_path, [*first, "--option", "ä", ""], **options)
    assert warm == real and real[0] == 7 and real[1]["argv"][1:] == ["--option", "ä", ""]


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN)}
    real, warm = both(tmp_path, ["-c", SAY], input="", **ignore)
    assert warm == real and real[1]["ignored"]


@pytest.mark.parametrize(
    "code",
    [
        "raise ValueError('that')",
        "raise SystemExit('said')",
        "raise SystemExit",
        "raise SystemExit(300)",
        "raise SystemExit(-3)",
        "raise KeyboardInterrupt",
        "import os; os.kill(os.getpid(), 15)",
        "import os; os.abort()",
        "import atexit; atexit.register(print, 'at the end'); print('x', end='')",
        "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.2), print('later'))).start()",
        "def f(:",
    ],
)
def test_it_ends_as_the_interpreter_does(code):
    real, warm = (subprocess.run([python, "-c", code], capture_output=True) for python in (INTERPRETER, PYTHON))
    assert (warm.returncode, warm.stdout) == (real.returncode, real.stdout)
    assert warm.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]


def test_a_missing_file_is_named(tmp_path):
    done = subprocess.run([PYTHON, "none.py"], capture_output=True, encoding="utf-8", cwd=tmp_path)
    assert done.returncode and "can't open file" in done.stderr and "none.py" in done.stderr


WAIT = """
import os, signal, time
try:
    print(os.getpid(), flush=True)
    while True:
        signal.pause()
except KeyboardInterrupt:
    print("interrupted")
"""


def test_signals_are_passed_on():
    process = subprocess.Popen([PYTHON, "-c", WAIT], stdout=subprocess.PIPE, encoding="utf-8")
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("interrupted\n", None) and process.returncode == 0


@pytest.mark.parametrize("group", [False, True])
def test_the_program_ends_with_its_command(group):
    process = subprocess.Popen([PYTHON, "-c", WAIT], stdout=subprocess.PIPE, start_new_session=True, encoding="utf-8")
    number = int(process.stdout.readline())
    assert number != process.pid
    os.killpg(process.pid, signal.SIGKILL) if group else process.kill()
    assert process.stdout.read() == "" and process.wait() == -signal.SIGKILL
    wait_until(lambda: not Path(f"/proc/{number}").exists(), "the program ends")


def test_what_a_fork_cannot_be_is_a_new_interpreter(tmp_path):
    """Another limit, variables that are read at an import, options of the interpreter: torch is not imported then."""
    code = "import json, sys; print(json.dumps('torch' in sys.modules))"
    few = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))}
    for words, options in (
        (["-c", code], few),
        (["-c", code], {"env": {**os.environ, "OMP_NUM_THREADS": "2"}}),
        (["-W", "ignore", "-c", code], {}),
    ):
        assert [said for _, said, _ in both(tmp_path, words, **options)] == [False, False]
    assert [said for _, said, _ in both(tmp_path, ["-c", code])] == [False, True]
    assert [said for _, said, _ in both(tmp_path, ["-c", code], env={**os.environ, "PYTHONPATH": "."})] == [False, True]


def test_only_the_folders_that_it_is_told_of_are_on_its_path(tmp_path):
    """In the interpreter's order, without the server's own."""
    code = "import json, sys; print(json.dumps(sys.path))"
    for told in ({}, {"PYTHONPATH": f"{tmp_path}:/elsewhere"}, {"PYTHONPATH": ""}):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | told
        real, warm = both(tmp_path, ["-c", code], env=environment)
        assert warm == real


def test_two_programs_draw_other_numbers():
    code = "import random, numpy, uuid; print(random.random(), numpy.random.rand(), uuid.uuid4())"
    said = [subprocess.run([PYTHON, "-c", code], capture_output=True, encoding="utf-8").stdout.split() for _ in "ab"]
    assert all(len(numbers) == 3 for numbers in said) and not set(said[0]) & set(said[1])
