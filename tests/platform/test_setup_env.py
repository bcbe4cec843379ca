"""tools/setup_env.sh with interpreters that only note what they are asked to install: which releases go together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mm.platform.megatron_versions import KNOWN_RELEASES

ROOT = Path(__file__).resolve().parents[2]

#: Says that it is another Python, copies itself where an environment is made, and notes the arguments of pip.
INTERPRETER = """#!/usr/bin/env bash
if [ "$1" = -c ]; then
    version="import sys, typing; sys.version_info = typing.NamedTuple('V', [('major', int), ('minor', int)])({version})"
    exec {python} -c "$version; exec(sys.argv[1])" "$2"
elif [ "$2" = venv ]; then
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
else
    echo "$*" >>{notes}
fi
"""


@pytest.fixture
def make(tmp_path):
    """Reads setup_env.sh under Python 3.`minor` and returns its exit status, what it said and what it installed."""

    def run(minor: int, **given: str) -> tuple[int, str, list[str]]:
        notes, python = tmp_path / "notes", tmp_path / f"python3.{minor}"
        notes.write_text("")
        python.write_text(INTERPRETER.format(python=sys.executable, version=f"3, {minor}", notes=notes))
        python.chmod(0o755)
        environment = {"PATH": os.environ["PATH"], "MEGATRON_MM_VENV": str(tmp_path / "venv"), "PYTHON": str(python)}
        words = ["bash", "-c", ". tools/setup_env.sh && command -v python"]
        done = subprocess.run(
            words, capture_output=True, text=True, cwd=ROOT, env={**environment, **given}, check=False
        )
        return done.returncode, done.stdout + done.stderr, notes.read_text().splitlines()

    return run


@pytest.mark.parametrize(("minor", "series"), [(10, "0.16"), (11, "0.16"), (12, "0.19")])
def test_each_python_gets_what_was_tested_on_it(make, tmp_path, minor, series):
    status, said, installed = make(minor)
    assert status == 0 and said.splitlines()[-1] == str(tmp_path / "venv/bin/python")
    assert installed == [
        "-m pip install --quiet torch==2.13.0",
        f"-m pip install --quiet --editable .[test] megatron-core=={KNOWN_RELEASES[series]}",
    ]
    assert make(minor)[2] == []  # the second time, nothing is out of date


def test_another_megatron_core_is_installed_into_what_is_there(make):
    make(12)
    assert make(12, MEGATRON_MM_CORE="megatron-core==0.16.1")[2][-1].endswith(" megatron-core==0.16.1")
    assert make(12)[2][-1].endswith(" megatron-core==0.19.2")


def test_an_environment_of_another_python_is_not_taken_for_it(make, tmp_path):
    make(11)
    status, said, installed = make(12)
    assert status == 1 and installed == []
    assert f"{tmp_path / 'venv'} has Python 3.11, not that of PYTHON={tmp_path / 'python3.12'}" in said
    (tmp_path / "bin").mkdir()
    (tmp_path / "python3.12").rename(tmp_path / "bin" / "python3")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    assert make(11, PYTHON="", PATH=path)[0] == 0  # nobody named one: what is there is used, not PATH's python3


def test_an_old_python_is_refused(make):
    status, said, _ = make(9)
    assert status == 1 and "older than 3.10; set PYTHON to a newer one" in said
