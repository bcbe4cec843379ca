"""Programs that this one starts import this checkout's package, and nothing from the folder in which they run.

`python -m` looks for modules in the working directory before all others, and a program beside itself. A user may stand
in a folder that others made, where a file by the name of a module of Python's would run.
"""

from __future__ import annotations

import os
from pathlib import Path

import megatron_mm


def environment(**more: str) -> dict[str, str]:
    """Variables of a program that this one starts: those of this process, and where modules are looked for.

    Python 3.10 does not know of the second of these (PYTHONSAFEPATH), and still looks in the working directory.

    Args:
        more: further variables.
    """
    package = str(Path(megatron_mm.__path__[0]).parent)
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", **more}
