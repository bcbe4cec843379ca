"""Continuous integration and tests/run.sh, with stand-ins for what takes long: what runs and is said, exit status."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: Notes its words and does what the file named after the kind of run says.
RUN = """#!/usr/bin/env bash
echo "${{*:-all}}" >>{notes}
if [ "${{1:-}}" = --newest ]; then . {newest}; else . {suite}; fi
"""


@pytest.fixture
def integrate(tmp_path):
    """Runs a copy of .ci/run in which tests/run.sh is a stand-in. Returns exit status, output and the calls."""
    for name in (".ci", "tests"):
        (tmp_path / name).mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    script = tmp_path / "tests" / "run.sh"
    files = {name: tmp_path / name for name in ("notes", "suite", "newest")}
    script.write_text(RUN.format(**files))
    script.chmod(0o755)

    def run(suite: str, newest: str, seconds: int = 0) -> tuple[int, list[str], list[str]]:
        files["notes"].write_text("")
        files["suite"].write_text(suite)
        files["newest"].write_text(newest)
        words = [str(tmp_path / ".ci" / "run")]
        environment = {**os.environ, "SECONDS": str(seconds)}  # bash counts on from there
        done = subprocess.run(words, capture_output=True, encoding="utf-8", env=environment, check=False)
        return done.returncode, (done.stdout + done.stderr).splitlines(), files["notes"].read_text().splitlines()

    return run


PASSED = "echo 12 passed in 3.45s; exit 0"


def test_both_pass(integrate):
    status, said, calls = integrate(PASSED, "echo 7 passed in 1.00s")
    assert status == 0 and calls == ["all", "--newest"]
    assert said == ["12 passed in 3.45s", "newest releases: tests/run.sh --newest passed"]


def test_a_failure_of_the_newest_is_told_and_fails_nothing(integrate):
    broken = """cat <<'EOF'
locks/python-3.11.txt -> installed: 1 change
    tyro 1.0.17 -> 1.1.0
FAILED tests/config/test_config.py::test_help - TypeError
2 failed, 5 passed in 1.00s
EOF
exit 1"""
    status, said, calls = integrate(PASSED, broken)
    assert status == 0 and calls == ["all", "--newest"]
    told = "tests/run.sh --newest failed with exit status 1, which fails nothing here (outputs/newest.log)"
    assert said == [
        "12 passed in 3.45s",
        f"newest releases: {told}",
        "newest:     tyro 1.0.17 -> 1.1.0",
        "newest: FAILED tests/config/test_config.py::test_help - TypeError",
    ]


def test_what_could_not_be_installed_is_told(integrate):
    line = "error: could not install what setup.py asks for: the package index could not be reached"
    said = integrate(PASSED, f"echo '{line}' >&2; exit 1")[1]
    assert said[-1] == f"newest: {line}"


@pytest.mark.parametrize("status", [1, 5])
def test_the_status_of_the_suite_is_that_of_the_run(integrate, status):
    found, said, calls = integrate(f"echo 1 failed, 11 passed in 3.45s; exit {status}", "exit 0")
    assert (found, said, calls) == (status, ["1 failed, 11 passed in 3.45s"], ["all"])


def test_after_an_hour_only_the_suite_runs(integrate):
    status, said, calls = integrate(PASSED, "exit 1", seconds=3600)
    assert status == 0 and calls == ["all"] and said[-1] == "newest releases: not tested, an hour has gone by"


#: In place of the environment: an interpreter that says which Python it is, or notes what it is asked to run.
PYTHON = """#!/usr/bin/env bash
case $1 in
-c) echo "(3, {minor})" ;;
*) echo "$MEGATRON_MM_VENV $MEGATRON_MM_LOCK $*" >>{notes}; exit {status} ;;
esac
"""


@pytest.fixture
def run_tests(tmp_path):
    """Runs a copy of tests/run.sh in an environment that notes. Returns exit status, output and the calls of pytest."""
    for name in ("tests/a", "tools", "bin", "examples/x"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "tests" / "a" / "test_marked.py").write_text("pytestmark = pytest.mark.interface\n")
    (tmp_path / "tests" / "a" / "test_other.py").write_text("pytestmark = pytest.mark.slow\n")
    shutil.copy(ROOT / "tests" / "run.sh", tmp_path / "tests")
    python, notes = tmp_path / "bin" / "python", tmp_path / "notes"
    (tmp_path / "tools" / "setup_env.sh").write_text("python_release() { echo 3.11; }\nPATH=bin:$PATH\n")

    def run(*words: str, minor: int = 11, status: int = 0) -> tuple[int, str, list[str]]:
        notes.write_text("")
        python.write_text(PYTHON.format(notes=notes, minor=minor, status=status))
        python.chmod(0o755)
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(python)}
        command = [str(tmp_path / "tests" / "run.sh"), *words]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, check=False)
        calls = [line for line in notes.read_text().splitlines() if "-m pytest" in line]
        return done.returncode, done.stdout + done.stderr, calls

    return run


@pytest.mark.parametrize(
    ("mode", "where"), [("newest", ".venv-newest newest"), ("lowest", ".venv-lowest locks/lowest.txt")]
)
def test_marked_tests_run_in_an_environment_of_their_own_and_words_go_to_pytest(run_tests, mode, where):
    status, _, (call,) = run_tests(f"--{mode}", "tests/a", "-x", status=3)
    assert status == 3 and call.startswith(f"{where} -m pytest ") and call.endswith(" -m interface tests/a -x")
    # Without a path, the files with such tests: others may not even import.
    assert run_tests(f"--{mode}", "-x")[2][0].endswith(" -m interface -x tests/a/test_marked.py")


def test_lowest_names_the_python_that_it_needs(run_tests):
    status, said, calls = run_tests("--lowest", minor=12)
    assert status == 1 and calls == []
    assert "error: locks/lowest.txt is for Python 3.11, which " in said and "set PYTHON to one" in said
