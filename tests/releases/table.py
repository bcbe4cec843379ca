"""The table of tests/releases/run.sh: releases x systems x ways of using an exported folder.

    python -m tests.releases.table FIGURES.json …       what check.py wrote, one file a release

Exits with 1 if a way is wrong somewhere.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def table(figures: list[dict]) -> tuple[list[str], bool]:
    """Lines of the table, and whether everything in it is right."""
    ways = list(dict.fromkeys(way for run in figures for results in run["systems"].values() for way in results))
    lines, right = [], True
    lines.append(f"{'transformers':<14}{'system':<18}" + " ".join(ways))
    for run in figures:
        for system, results in run["systems"].items():
            cells = []
            for way in ways:
                result = results.get(way, "-")  # this system has no such way
                cells.append({"ok": "ok", "-": "-"}.get(result, "WRONG").ljust(len(way)))
                right &= result in ("ok", "-")
            lines.append(f"{run['transformers']:<14}{system:<18}" + " ".join(cells).rstrip())
    return lines, right


def main() -> int:
    """See the top."""
    lines, right = table([json.loads(Path(name).read_text()) for name in sys.argv[1:]])
    print("\n" + "\n".join(lines))
    return not right


if __name__ == "__main__":
    sys.exit(main())
