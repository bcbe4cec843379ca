"""Rules about a record's other fields: scores of safety, quality and language that a classifier left there."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from megatron_mm.data.cleaning.verdict import Verdict
from megatron_mm.media.errors import DataError


@dataclass(frozen=True)
class FieldRules:
    """What the fields of a record that is kept must be. "meta.nsfw" is the field nsfw of the object meta."""

    below: tuple[tuple[str, float], ...] = ()
    """(field, limit): the number must be smaller."""
    above: tuple[tuple[str, float], ...] = ()
    """(field, limit): the number must be larger."""
    equals: tuple[tuple[str, str], ...] = ()
    """(field, value): it must be this text, or one of them where a field stands here several times."""

    def judge(self, record: dict, where: str) -> Verdict | None:
        """The first rule that a record breaks.

        Raises:
            DataError: a field is missing, or no number where a rule compares it with one.
        """
        for name, limit in self.below:
            if not (value := _number(record, name, where)) < limit:
                return Verdict(f"field: {name} below {limit:g}", {"value": _jsonable(value)})
        for name, limit in self.above:
            if not (value := _number(record, name, where)) > limit:
                return Verdict(f"field: {name} above {limit:g}", {"value": _jsonable(value)})
        for name in dict.fromkeys(name for name, _ in self.equals):
            allowed = [value for other, value in self.equals if other == name]
            found = _field(record, name, where)
            text = found if isinstance(found, str) else json.dumps(found)
            if text not in allowed:
                return Verdict(f"field: {name} is {' or '.join(allowed)}", {"value": text})
        return None


def _field(record: dict, name: str, where: str) -> object:
    if name in record:
        return record[name]
    value: object = record
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise DataError(f'{where}: lacks the field "{name}", which a rule asks for (it has: {", ".join(record)})')
        value = value[part]
    return value


def _number(record: dict, name: str, where: str) -> float:
    value = _field(record, name, where)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    try:  # cells of CSV and TSV are strings
        return float(value if isinstance(value, str) else "")
    except ValueError:
        raise DataError(f'{where}: field "{name}" must be a number, not {json.dumps(value)[:80]}') from None


def _jsonable(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
