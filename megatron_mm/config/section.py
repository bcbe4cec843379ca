"""What every section of the settings tree is made of."""

from __future__ import annotations

from collections.abc import Iterator

import tyro
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

#: Decorator of a section: typed, checked on assignment, unknown fields refused.
section = dataclass(config=ConfigDict(extra="forbid", validate_assignment=True), kw_only=True)


def megatron(*names: str):
    """The names by which Megatron's scripts call a field."""
    return tyro.conf.arg(aliases=[f"--{name}" for name in names])


def divides(name: str, value: int, by_name: str, by: int) -> Iterator[str]:
    """What to say where `value` is no multiple of `by`."""
    if by < 1 or value % by:
        yield f"{name} is {value}, which does not divide by {by_name} = {by}"


def share(name: str, value: float) -> Iterator[str]:
    """What to say where a ratio is not strictly between 0 and 1."""
    if not 0.0 < value < 1.0:
        yield f"{name} is {value}; it must lie strictly between 0 and 1"
