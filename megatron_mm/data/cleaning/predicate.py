"""A user's own rule: a function of a record, in a module or a Python file."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path

from megatron_mm.config.plugins import load_plugin
from megatron_mm.data.cleaning.records import Record
from megatron_mm.data.cleaning.verdict import Verdict
from megatron_mm.media.errors import DataError


class PredicateError(DataError):
    """The user's function failed: always the end of a run, whatever is done with unreadable records."""


class Predicate:
    """A function `keep(record)` or `keep(record, media)`.

    It is given the record's fields (a dict) and its `records.Media`, which decodes when asked. It returns None or True
    to keep the record, a reason to drop it, or False for a reason without words.

    Args:
        name: "module:function" or "file.py:function".

    Raises:
        DataError: there is no such function.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        module_name, _, function = name.rpartition(":")
        if not module_name or not function:
            raise DataError(f"predicate: {name!r} must be module:function or file.py:function")
        try:
            module = load_plugin(module_name, Path(), "predicate")
        except ValueError as error:
            raise DataError(str(error)) from error
        found = getattr(module, function, None)
        if not callable(found):
            raise DataError(f"predicate: {module_name} has no function {function!r}")
        self._function: Callable = found
        self._takes_media = len(inspect.signature(found).parameters) > 1
        source = inspect.getsourcefile(module)
        self.identity = hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else ""
        """SHA-256 of the file that holds it."""

    def judge(self, record: Record) -> Verdict | None:
        """Asks the function.

        Raises:
            PredicateError: it fails, or returns something else.
            DataError: a medium that it asked for does not decode.
        """
        try:
            answer = self._function(record.fields, record.media) if self._takes_media else self._function(record.fields)
        except DataError:
            raise
        except Exception as error:
            raise PredicateError(
                f"{record.where}: the predicate {self.name} failed ({type(error).__name__}: {error})"
            ) from error
        if answer is None or answer is True:
            return None
        if answer is False:
            return Verdict("predicate", {})
        if not isinstance(answer, str):
            raise PredicateError(
                f"{record.where}: the predicate {self.name} returned {type(answer).__name__}; it must be None or True "
                "to keep the record, a reason (str) or False to drop it"
            )
        return Verdict(f"predicate: {answer}", {})
