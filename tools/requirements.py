"""What setup.py asks for, a requirement a line:  python tools/requirements.py [EXTRA …]  (needs setuptools)."""

from __future__ import annotations

import sys
from pathlib import Path

import setuptools

_SETUP = Path(__file__).resolve().parent.parent / "setup.py"


def requirements(*extras: str) -> list[str]:
    """The requirements of the package and of these extras of it.

    Raises:
        ValueError: setup.py has no such extra.
    """
    distribution = setuptools.distutils.core.run_setup(str(_SETUP), stop_after="init")
    lines = list(distribution.install_requires)
    for extra in extras:
        if extra not in distribution.extras_require:
            raise ValueError(f"setup.py has no extra {extra}; it has {', '.join(sorted(distribution.extras_require))}")
        lines += distribution.extras_require[extra]
    return lines


if __name__ == "__main__":
    try:
        print("\n".join(requirements(*sys.argv[1:])))
    except ValueError as error:
        sys.exit(f"error: {error}")
