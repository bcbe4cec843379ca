"""Python with torch already imported, for the programs that tests start: a process of its own each, forked, not begun.

Most of a short program's time is the import of torch, its compiler and transformers: five to seven seconds. One process
(`server.py`) imports them once a session and forks itself for each program. A command takes what `python` takes
(`client.py`): it hands arguments, environment, working directory and open files to a fork, passes signals
on, and ends as the fork ends; if it is killed, so is the fork. What the fork cannot be (other options of the
interpreter, other variables that libraries read when they are imported, other limits) runs in a new interpreter.
Tests have it from tests/support/programs.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_HERE = Path(__file__).resolve().parent
#: Environment variable: folder with the commands and the server's socket.
FOLDER = "MEGATRON_MM_WARM_PYTHON"


@contextlib.contextmanager
def served():
    """Starts the server, which imports at its first program, and ends it."""
    with tempfile.TemporaryDirectory(prefix="megatron-mm-python-") as name:
        folder = Path(name)
        (folder / "bin").mkdir()
        client = f"#!{sys.executable} -ISE\n" + (_HERE / "client.py").read_text()
        for command, words in (("python", []), ("torchrun", ["-m", "torch.distributed.run"])):
            path = folder / "bin" / command
            text = client.replace("REAL = None", f"REAL = {sys.executable!r}").replace("WORDS = []", f"WORDS = {words}")
            path.write_text(text.replace("SOCKET = None", f"SOCKET = {str(folder / 'socket')!r}"))
            path.chmod(0o755)
        # As an environment of tools/setup_env.sh: up to date if the real one is.
        if (installed := Path(sys.prefix) / "installed").exists():
            shutil.copy(installed, folder / "installed")
        with (folder / "log").open("w") as log:
            server = subprocess.Popen(
                [sys.executable, str(_HERE / "server.py"), str(folder / "socket"), str(folder / "bin" / "python")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        os.environ[FOLDER] = name
        try:
            yield
        finally:
            del os.environ[FOLDER]
            server.terminate()
            server.wait()
