"""Why a record is dropped."""

from __future__ import annotations

from typing import NamedTuple


class Verdict(NamedTuple):
    """A record that is dropped."""

    reason: str
    """What the report counts: few different ones."""
    detail: dict
    """What makes it so in this record, as JSON."""
