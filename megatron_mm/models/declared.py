"""What one reader of a microbatch may see of it: what every stage has, and the fields that it declares.

A pipeline stage loads only the fields that its nodes declare. A module that reads another would find it in one process
and miss it in a pipeline whose cuts lie elsewhere, so it is refused in one process too.
"""

from __future__ import annotations

from typing import Any

from megatron_mm.data.reading.microbatch import Microbatch

_PLAIN = frozenset({"plan", "sample_ids", "slots"})


class DeclaredBatch:
    """A microbatch as one reader sees it.

    Args:
        reader: who reads, for messages: "node 'text.embedding'".
        declared: fields that it declares; None: it may read all.

    Raises:
        ValueError: from reading an attribute: the reader does not declare the field.
    """

    def __init__(self, batch: Microbatch, reader: str, declared: frozenset[str] | None) -> None:
        self._batch, self._reader, self._declared = batch, reader, declared
        self._always = batch.plan.always_read
        self.fields_read: set[str] = set()
        """Fields that were read so far, beyond those that every stage has."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in _PLAIN and name not in self._always:
            self.refuse_undeclared({name})
            self.fields_read.add(name)
        return getattr(self._batch, name)

    def refuse_undeclared(self, names: set[str] | frozenset[str]) -> None:
        """Raises ValueError where the reader does not declare one of these fields."""
        if self._declared is None:
            return
        for name in sorted(names - self._declared):
            getattr(self._batch, name)  # one that no microbatch of this system has is said to be so
            declared = ", ".join(sorted(self._declared)) or "none"
            raise ValueError(
                f"{self._reader} reads {name}, which it does not declare (it declares {declared}): a pipeline stage "
                "loads only what its nodes and losses declare in `fields`"
            )
