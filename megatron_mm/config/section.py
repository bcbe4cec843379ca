"""What every section of the settings tree is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

import tyro
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

#: Path of the size by which heads and columns are divided, for messages.
TENSOR_PARALLEL = "parallel.tensor_model_parallel_size"

#: Decorator of a section: typed, unknown fields refused, and frozen: another layout is another value (`changed`).
section = dataclass(config=ConfigDict(extra="forbid"), kw_only=True, frozen=True)

Section = TypeVar("Section")


def changed(section: Section, changes: Mapping[str, object], place: str = "") -> Section:
    """Another value of a section, or of the whole tree, in which some fields are others.

    Args:
        changes: values by the path of their field, such as `training.global_batch_size`.
        place: path of the section itself, for messages.

    Raises:
        ValueError: there is no such field, or a value is not of its type.
    """
    fields: dict[str, object] = {}
    below: dict[str, dict[str, object]] = {}
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        if name not in getattr(section, "__dataclass_fields__", {}):
            raise ValueError(f"{place}{path}: {type(section).__name__} has no field {name!r}")
        if rest:
            below.setdefault(name, {})[rest] = value
        else:
            fields[name] = value
    for name, inner in below.items():
        fields[name] = changed(fields.get(name, getattr(section, name)), inner, f"{place}{name}.")
    return replace(section, **fields)


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


def heads_problems(name: str, part, tp: int, groups: bool = False) -> Iterator[str]:
    """Heads divide the width, and tensor parallelism divides heads, key-value heads and the MLP."""
    heads = f"{name}.num_attention_heads"
    yield from divides(f"{name}.hidden_size", part.hidden_size, heads, part.num_attention_heads)
    yield from divides(heads, part.num_attention_heads, TENSOR_PARALLEL, tp)
    if groups:
        key_value = f"{name}.num_query_groups"
        yield from divides(heads, part.num_attention_heads, key_value, part.num_query_groups)
        yield from divides(key_value, part.num_query_groups, TENSOR_PARALLEL, tp)
    yield from divides(f"{name}.ffn_hidden_size", part.ffn_hidden_size, TENSOR_PARALLEL, tp)


def weights_problems(name: str, **weights: float) -> Iterator[str]:
    """Objective weights must be non-negative and not all zero."""
    for key, value in weights.items():
        if value < 0:
            yield f"{name}.{key} is {value}; a weight must not be negative"
    if not any(value > 0 for value in weights.values()):
        yield f"{name}: every weight is zero ({', '.join(weights)}); nothing would be learned"
