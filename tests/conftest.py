"""Shared by all tests: one thread a process (several processes run on two cores), and the CPU platform."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

#: Longest first, so that the second of two workers is not left waiting for the last file.
_LONGEST = ("test_readme.py", "test_run.py", "/examples/", "test_system_layouts.py", "/training/", "/quickstart/")


def pytest_collection_modifyitems(items):
    """Files of whole runs come first; the order within a file stays."""

    def place(item) -> int:
        path = item.path.as_posix()
        return next((number for number, part in enumerate(_LONGEST) if part in path), len(_LONGEST))

    items.sort(key=place)
