"""tools/setup_env.sh with interpreters that only note what they are asked to install: which releases go together."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_mm.platform.megatron_versions import KNOWN_RELEASES
from tests.support import programs

ROOT = Path(__file__).resolve().parents[2]
TORCH = (ROOT / "locks" / "torch.txt").read_text().strip()

#: Says that it is another Python, copies itself where an environment is made, and notes the arguments of pip install,
#: but fails as pip does without a network where they name what is in the file `lacking`.
INTERPRETER = """#!/usr/bin/env bash
if [ "$1" = -c ]; then
    version="import sys, typing; sys.version_info = typing.NamedTuple('V', [('major', int), ('minor', int)])({version})"
    exec {python} -c "$version; exec(sys.argv[1])" "$2"
elif [ "$1" = -V ]; then
    echo "Python {said}"
elif [ "$2" = venv ]; then
    mkdir -p "${{!#}}/bin" && cp "$0" "${{!#}}/bin/python"
elif [ "$2 $3" = "pip install" ]; then
    echo "$*" >>{notes}
    if [ -e {lacking} ] && [[ "$*" = *"$(cat {lacking})"* ]]; then
        echo "ERROR: No matching distribution found for $(cat {lacking})" >&2
        exit 1
    fi
elif [ "$2" = pip ]; then
    test ! -e {no_pip}
fi
"""


class Scripts:
    """A copy of what setup_env.sh reads, in which it runs under Python 3.`minor`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.venv = folder / "venv"
        self.lacking, self.no_pip = folder / "lacking", folder / "no-pip"
        shutil.copytree(ROOT / "locks", folder / "locks")
        (folder / "tools").mkdir()
        for name in ("setup_env.sh", "new_venv.sh", "pip_install.sh", "half_installed.py"):
            shutil.copy(ROOT / "tools" / name, folder / "tools")
        shutil.copy(ROOT / "setup.py", folder)

    def python(self, minor: int) -> Path:
        return self.folder / f"python3.{minor}"

    def __call__(self, minor: int, **given: str) -> tuple[int, str, list[str]]:
        """Exit status, what it said, and what it installed."""
        notes, python = self.folder / "notes", self.python(minor)
        notes.write_text("")
        python.write_text(
            INTERPRETER.format(
                python=programs.INTERPRETER,
                version=f"3, {minor}",
                said=f"3.{minor}.0",
                notes=notes,
                lacking=self.lacking,
                no_pip=self.no_pip,
            )
        )
        python.chmod(0o755)
        environment = {"PATH": os.environ["PATH"], "MEGATRON_MM_VENV": str(self.venv), "PYTHON": str(python)}
        words = ["bash", "-euc", ". tools/setup_env.sh && command -v python"]
        done = subprocess.run(
            words, capture_output=True, encoding="utf-8", cwd=self.folder, env={**environment, **given}, check=False
        )
        return done.returncode, done.stdout + done.stderr, notes.read_text().splitlines()


@pytest.fixture
def make(tmp_path):
    return Scripts(tmp_path)


@pytest.mark.parametrize(("minor", "series"), [(10, "0.16"), (11, "0.16"), (12, "0.19"), (13, "0.19")])
def test_each_python_gets_the_releases_of_its_file(make, minor, series):
    status, said, installed = make(minor)
    assert status == 0 and said.splitlines()[-1] == str(make.venv / "bin/python")
    pinned = make.venv / "lock.txt"
    assert installed == [
        f"-m pip install --quiet {TORCH} --constraint {pinned}",
        f"-m pip install --quiet --no-deps --requirement {pinned}",
        "-m pip install --quiet --no-deps --no-build-isolation --editable .",
    ]
    assert f"megatron_mm and the releases of locks/python-3.{minor}.txt" in said
    assert pinned.read_text() == (ROOT / "locks" / f"python-3.{minor}.txt").read_text()
    assert f"megatron-core=={KNOWN_RELEASES[series]}" in pinned.read_text().splitlines()
    assert make(minor)[2] == []  # the second time, nothing is out of date


def test_a_python_without_a_file_gets_what_setup_py_allows_and_is_told(make):
    status, said, installed = make(14)
    assert status == 0
    assert "there is no locks/python-3.14.txt: this Python gets the newest releases that setup.py allows" in said
    assert installed == [
        f"-m pip install --quiet {TORCH}",
        f"-m pip install --quiet --editable .[test] {TORCH}",
    ]
    assert make(14)[2] == []


@pytest.mark.parametrize("name", ["setup.py", "locks/python-3.12.txt"])
def test_a_change_of_bounds_or_lock_installs_anew(make, name):
    make(12)
    with open(make.folder / name, "a") as file:
        file.write("# changed\n" if name == "setup.py" else "another==1.0\n")
    assert len(make(12)[2]) == 3
    assert make(12)[2] == []


def test_a_change_of_the_lock_of_another_python_does_not(make):
    make(12)
    (make.folder / "locks" / "python-3.11.txt").write_text("another==1.0\n")
    assert make(12)[2] == []


def test_another_megatron_core_takes_the_place_of_the_locked_one(make):
    make(12)
    status, said, installed = make(12, MEGATRON_MM_CORE="megatron-core==0.16.1")
    pinned = make.venv / "lock.txt"
    assert status == 0 and installed[2] == f"-m pip install --quiet megatron-core==0.16.1 --constraint {pinned}"
    assert "but megatron-core==0.16.1" in said
    lock = (ROOT / "locks" / "python-3.12.txt").read_text().splitlines()
    assert pinned.read_text().splitlines() == [line for line in lock if not line.startswith("megatron-core==")]
    make(12)
    assert pinned.read_text().splitlines() == lock


def test_another_torch_is_installed_in_place_of_the_locked_one(make):
    installed = make(11, MEGATRON_MM_TORCH="torch==2.14.1")[2]
    assert installed[0].startswith("-m pip install --quiet torch==2.14.1 --constraint ")
    assert make(11)[2][0].startswith(f"-m pip install --quiet {TORCH} ")


def test_another_lock_file(make):
    installed = make(11, MEGATRON_MM_LOCK="locks/lowest.txt")[2]
    assert len(installed) == 3
    assert (make.venv / "lock.txt").read_text() == (ROOT / "locks" / "lowest.txt").read_text()
    status, said, installed = make(11, MEGATRON_MM_LOCK="locks/none.txt")
    assert status == 1 and installed == [] and "there is no locks/none.txt (MEGATRON_MM_LOCK)" in said


def test_the_newest_are_looked_for_each_time_and_torch_stays(make):
    for _ in range(2):
        status, _, installed = make(12, MEGATRON_MM_LOCK="newest")
        assert status == 0
        upgrade = f"--editable .[test] {TORCH} --upgrade --upgrade-strategy eager"
        assert installed == [f"-m pip install --quiet {TORCH}", f"-m pip install --quiet {upgrade}"]
    assert len(make(12)[2]) == 3  # an environment of the newest is not taken for one of the lock


@pytest.mark.parametrize("number", range(3))
def test_an_installation_that_failed_is_done_again(make, number):
    words = make(11)[2][number]
    shutil.rmtree(make.venv)
    make.lacking.write_text(words.split("--quiet ")[1])
    status, said, installed = make(11)
    assert status == 1 and len(installed) == number + 1
    what = [f"{TORCH} (locks/python-3.11.txt)", "the releases of locks/python-3.11.txt", "megatron_mm"][number]
    line = f"error: could not install {what}: the package index has no {make.lacking.read_text()} for Python 3.11.0"
    assert said.splitlines()[-1] == line
    make.lacking.unlink()
    assert len(make(11)[2]) == 3
    assert make(11)[2] == []


def test_what_was_complete_before_a_failed_change_is_not_taken_as_complete_after_it(make):
    make(11)
    lock = make.folder / "locks" / "python-3.11.txt"
    before = lock.read_text()
    lock.write_text(before + "another==1.0\n")
    make.lacking.write_text("--requirement")
    assert make(11)[0] == 1
    make.lacking.unlink()
    lock.write_text(before)
    assert len(make(11)[2]) == 3


def test_an_environment_without_pip_is_made_anew(make):
    make(11)
    make.no_pip.touch()
    (make.venv / "installed").unlink()
    status, said, installed = make(11)
    assert status == 1 and installed == [] and f"{make.venv} is no environment of Python's venv" in said
    (make.venv / "pyvenv.cfg").touch()
    status, said, installed = make(11)
    assert status == 0 and f"making the environment {make.venv} anew: it has no pip" in said and len(installed) == 3


def test_an_environment_of_another_python_is_not_taken_for_it(make):
    make(11)
    status, said, installed = make(12)
    assert status == 1 and installed == []
    assert f"{make.venv} has Python 3.11, not that of PYTHON={make.python(12)}" in said
    (make.folder / "bin").mkdir()
    make.python(12).rename(make.folder / "bin" / "python3")
    path = f"{make.folder / 'bin'}:{os.environ['PATH']}"
    assert make(11, PYTHON="", PATH=path)[0] == 0  # nobody named one: what is there is used, not PATH's python3


def test_an_old_python_is_refused(make):
    status, said, _ = make(9)
    assert status == 1 and "older than 3.10; set PYTHON to a newer one" in said


def test_a_python_that_does_not_run_is_named(make):
    shim = make.folder / "python3.12"
    shim.write_text("#!/bin/sh\necho python3.12: command not found >&2\nexit 127\n")
    shim.chmod(0o755)
    words = ["bash", "-c", ". tools/setup_env.sh"]
    for python in (str(shim), "python3.99"):
        done = subprocess.run(
            words,
            capture_output=True,
            encoding="utf-8",
            cwd=make.folder,
            env={**os.environ, "PYTHON": python},
            check=False,
        )
        assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"{python} is missing, does not run")


def test_an_environment_of_another_tool_is_neither_emptied_nor_searched_for_halves(make):
    """uv's have no pip; conda's have metadata without the list of files that pip writes."""
    make(11)
    shutil.rmtree(make.venv)
    site = make.venv / "lib" / "python3.11" / "site-packages"
    (site / "numpy-2.0.0.dist-info").mkdir(parents=True)
    (site / "numpy-2.0.0.dist-info" / "METADATA").touch()
    (make.venv / "pyvenv.cfg").touch()
    (make.venv / "bin").mkdir()
    shutil.copy(make.python(11), make.venv / "bin" / "python")
    make.no_pip.touch()
    status, said, installed = make(11)
    assert status == 1 and installed == [] and "was not made by the scripts here" in said
    make.no_pip.unlink()
    halves = make.folder / "tools" / "half_installed.py"
    halves.write_text("raise SystemExit('searched')")
    assert make(11)[0] == 0 and (site / "numpy-2.0.0.dist-info" / "METADATA").exists()
    assert "half_installed" not in make(11)[1]
