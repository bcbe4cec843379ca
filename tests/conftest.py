"""Shared by all tests: one thread a process (several processes run on two cores), and nothing of the user's home."""

import contextlib
import os
import sys
import tempfile

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
#: transformers copies the code of a model that it loads there, by the name of its folder: two suites at the same time
#: would write the same files. Nothing is asked of Hugging Face's servers.
_cache = tempfile.TemporaryDirectory(prefix="megatron-mm-tests-")
os.environ["HF_HOME"], os.environ["HF_HUB_OFFLINE"] = _cache.name, "1"

#: Longest first, so that the second of two workers is not left waiting for the last file.
_LONGEST = (
    *("test_readme.py", "test_run.py", "/examples/", "test_system_layouts.py"),
    *("/checks/", "/checkpoints/", "/training/", "/quickstart/"),
)


def pytest_configure(config):
    """A server of programs for each process that runs tests: each has a cache of its own."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        from tests.support import warm_python

        stack = contextlib.ExitStack()
        stack.enter_context(warm_python.served())
        config.add_cleanup(stack.close)


@pytest.fixture(scope="session", autouse=True)
def _what_the_package_starts_is_forked():
    """And what the tests start by tests/support/programs.py."""
    from tests.support.programs import INTERPRETER, PYTHON

    sys.executable = PYTHON
    yield
    sys.executable = INTERPRETER


def pytest_collection_modifyitems(items):
    """Files of whole runs come first; the order within a file stays."""

    def place(item) -> int:
        path = item.path.as_posix()
        return next((number for number, part in enumerate(_LONGEST) if part in path), len(_LONGEST))

    items.sort(key=place)
