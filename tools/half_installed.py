"""Forgets packages whose installation was interrupted, so that the next `pip install` installs them again.

    python tools/half_installed.py      in the environment of this interpreter

pip writes the list of a package's files (RECORD, with the file INSTALLER in it) last, but takes a package as installed
as soon as its METADATA lies there: a process that was killed in between would leave it half there for good. What pip
had set aside to remove (~name) is removed as well. Needs nothing but Python.
"""

from __future__ import annotations

import csv
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path


def is_complete(record: Path) -> bool:
    """Whether a package's list of files is the one that pip writes at the end, and its files are there.

    Their contents are not looked at: who added a certificate to a bundle after it was installed wants to keep it.

    Args:
        record: its RECORD, in `NAME-VERSION.dist-info`, relative to whose parent the files are named.
    """
    if not record.is_file():
        return False
    site = record.parent.parent
    with open(record, newline="", encoding="utf-8") as lines:
        names = [row[0] for row in csv.reader(lines) if row]
    if not any(Path(name) == Path(record.parent.name, "INSTALLER") for name in names):
        return False
    return all((site / name).is_file() for name in names if not name.endswith(".pyc"))  # those are compiled again


def forget(site: Path) -> Iterator[str]:
    """Removes the metadata of packages that are not complete, and leftovers; yields the name of each."""
    for left in sorted(site.glob("~*")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield left.name
    for folder in sorted(site.glob("*.dist-info")):
        if not is_complete(folder / "RECORD"):
            shutil.rmtree(folder)
            yield folder.name.removesuffix(".dist-info")


def main() -> None:
    """Says what is installed again."""
    for name in forget(Path(sysconfig.get_path("purelib"))):
        print(f"was not installed completely: {name}")


if __name__ == "__main__":
    main()
