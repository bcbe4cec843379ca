"""What run.sh answers without running: help, and mistakes in its options."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "quickstart" / "run.sh"


def run(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", str(SCRIPT), *options], capture_output=True, text=True)


def test_help_names_every_option_and_runs_nothing():
    done = run("--help")
    assert done.returncode == 0 and done.stderr == ""
    assert all(word in done.stdout for word in ("--smoke", "--output", "--recipe")) and "==" not in done.stdout


@pytest.mark.parametrize(("options", "message"), [(["--smok"], "--smok"), (["--output"], "--output needs a value")])
def test_mistakes_are_named(options, message):
    done = run(*options)
    assert done.returncode == 2 and message in done.stderr and "==" not in done.stdout
