"""What files that others made may try: code that leaves a marker when it runs, a secret elsewhere on the machine, names
that hang a reader."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.programs import PYTHON
from tests.support.waiting import HANG_SECONDS

ROOT = Path(__file__).parents[2]
#: In no output.
SECRET = "the launch code is 7-4-1-9"


class Hostile:
    """A folder beside what others made.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.marker = folder, folder / "it-ran"
        self.secret = folder / "secret.txt"
        self.secret.write_text(f"{SECRET}\n")
        self.code = f"open({str(self.marker)!r}, 'a').close()\n"
        """Source of a module."""
        self.pickled = pickle.dumps(_Opens(str(self.marker)))
        """A pickle that leaves the marker where it is read."""

    @property
    def ran(self) -> bool:
        """Whether any of it ran."""
        return self.marker.exists()

    def special(self, kind: str, path: Path) -> Path:
        """Makes `path` what no reader should open: "pipe", "socket", "folder", or a link to a "device"."""
        path.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as end:
                short = self.folder.parent / "s"  # an address has at most 108 bytes
                end.bind(os.path.relpath(short))
            short.rename(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to("/dev/zero")
        return path


class _Opens:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "a")


SPECIAL = ("pipe", "socket", "device", "folder")


def returns(call: Callable[[], object]) -> None:
    """Runs what may wait for ever, if it is wrong, in a thread, and hands on what it raises."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(HANG_SECONDS / 30)
    assert not thread.is_alive(), "it waits, as for the other end of a pipe"
    if raised:
        raise raised[0]


def tool(*words: object, folder: Path = ROOT, python: str = PYTHON) -> subprocess.CompletedProcess:
    """Runs a program of this repository in a folder."""
    program, *rest = map(str, words)
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [python, str(ROOT / program), *rest]
    return subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, encoding="utf-8", timeout=HANG_SECONDS
    )


def check_refused(done: subprocess.CompletedProcess, *named: str) -> None:
    """One line says what was wrong, and names these."""
    assert done.returncode in (1, 2), done.stdout[-1000:] + done.stderr[-2000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert all(name in done.stderr for name in named), done.stderr[-2000:]
    assert SECRET not in done.stdout + done.stderr


def check_no_secret(*folders: Path) -> None:
    """No file in these folders has it."""
    for folder in folders:
        for path in folder.rglob("*"):
            assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


@pytest.fixture
def hostile(tmp_path_factory) -> Hostile:
    """Beside `tmp_path`; what it tried did not work when the test ends."""
    made = Hostile(tmp_path_factory.mktemp("hostile"))
    yield made
    assert not made.ran, "code ran that nobody named"
