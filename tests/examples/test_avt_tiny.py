"""AVT's tiny run: its options, what its report demands, and the whole of it on a few samples."""

import subprocess
from pathlib import Path

import pytest

from examples.avt_33b.report import required

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "avt_33b" / "tiny.sh"


def run(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", str(SCRIPT), *options], capture_output=True, text=True)


def test_help_names_every_option_and_runs_nothing():
    done = run("--help")
    assert done.returncode == 0 and done.stderr == ""
    words = ("--smoke", "--output", "--recipe", "--cache")
    assert all(word in done.stdout for word in words) and "==" not in done.stdout


@pytest.mark.parametrize(("options", "message"), [(["--smok"], "--smok"), (["--output"], "--output needs a value")])
def test_mistakes_are_named(options, message):
    done = run(*options)
    assert done.returncode == 2 and message in done.stderr and "==" not in done.stdout


def test_three_times_a_low_baseline_or_half_the_error_of_a_high_one():
    assert required(0.01) == pytest.approx(0.03) and required(0.3) == pytest.approx(0.9)
    assert required(0.5) == pytest.approx(0.75)
