"""Python and torchrun for the programs that tests start, and the environment of scripts that call them.

While tests run, `sys.executable` is PYTHON (tests/conftest.py), so that what the package starts is forked as well. A
test takes INTERPRETER where the interpreter itself is what it looks at: what is imported, how much memory is taken.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.support.warm_python import FOLDER

_folder = Path(os.environ[FOLDER]) if FOLDER in os.environ else None

INTERPRETER = sys.executable
#: Takes what `python` takes; a fork of a process that has imported torch where the session has one.
PYTHON = str(_folder / "bin" / "python") if _folder else INTERPRETER
#: Before the number of processes and the words of a program.
TORCHRUN = (PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def environment(**variables: str) -> dict[str, str]:
    """Of scripts that call plain `python` and `torchrun`, or take the environment that tools/setup_env.sh makes."""
    path = f"{Path(PYTHON).parent}{os.pathsep}{os.environ['PATH']}"
    made = {"MEGATRON_MM_VENV": str(_folder)} if _folder and (_folder / "installed").exists() else {}
    return {**os.environ, **made, "PATH": path, **variables}
