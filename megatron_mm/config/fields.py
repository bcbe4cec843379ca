"""Fields of a microbatch: how they are declared, and what is listed once for a microbatch and named by slots of rows.

A field has a name, a dtype and a shape of symbolic sizes: R rows, T tokens of a row, D documents of the fullest row, I
images and frames, A sounds, V clips, F frames of a clip, K and J image and sound slots of a row, and the letter of each
`Listed` of a system's own. From the declaration follow the checks of a user's microbatches, the generated rows of
layout checks, the shapes of a dry run, collation and padding (data/reading/). The fields of the package are declared in
the same way (config/inputs.py).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

#: Letters of sizes that every microbatch has.
SIZES = "RTDIAVFKJ"
#: What a microbatch lists without being told.
BUILT_IN_LISTS = ("image", "sound", "clip")
#: Smallest and largest number of the dtypes of whole numbers.
WHOLE = {"int64": (-(2**63), 2**63 - 1), "int32": (-(2**31), 2**31 - 1), "uint8": (0, 255)}
DType = Literal["int64", "int32", "uint8", "bool", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Field:
    """A field of a microbatch.

    Attributes:
        name: what it holds, then `_` and a letter for each dimension: `pulses_SN`.
        shape: for each dimension its size: a letter (above), or a number. One of a system's own begins with R, R and T,
            I, A, or the letter of a `Listed`.
        dtype: as torch names it.
        low: smallest value allowed; None: any.
        high: largest value allowed; a letter (of a system's own, T alone): an index of that dimension, so at most its
            size less one; None: any.
        pad: value where a row, a token or a medium has nothing, allowed beside the range.
        always: every pipeline stage has it; the others are loaded where a node or a loss declares them.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: DType = "float32"
    low: float | None = None
    high: float | str | None = None
    pad: float = 0
    always: bool = False


@dataclass(frozen=True)
class Listed:
    """What documents have any number of, such as readings of a sensor: listed once for the microbatch, by rows.

    Rows name what they have by slots. Every stage has the slots, in two fields made of the name: `NAME_slots_RK`, index
    into the list (-1: empty slot), and `NAME_slot_documents_RK`, document of each slot (-2: empty slot).

    Attributes:
        name: of one, such as `pulse`.
        letter: of their number in shapes; at least 1, because zeros stand in where there are none.
        most: that a row may have, over all its documents.
    """

    name: str
    letter: str
    most: int = 1

    @property
    def slots(self) -> str:
        """Name of the field of slots."""
        return f"{self.name}_slots_RK"

    @property
    def slot_documents(self) -> str:
        """Name of the field of the slots' documents."""
        return f"{self.name}_slot_documents_RK"

    @property
    def slots_size(self) -> str:
        """The size, in shapes, of slots of a row."""
        return f"slots of {self.name}"

    def fields(self) -> tuple[Field, Field]:
        """The slots, declared."""
        shape = ("R", self.slots_size)
        return (
            Field(self.slots, shape, "int64", -1, self.letter, pad=-1, always=True),
            Field(self.slot_documents, shape, "int64", -2, "D", pad=-2, always=True),
        )


def check_own(fields: tuple[Field, ...], lists: tuple[Listed, ...], taken: frozenset[str], packed: bool) -> None:
    """Refuses declarations of a system's own that nothing could be read by.

    Args:
        taken: names that a microbatch has already.
        packed: a row holds several documents.

    Raises:
        ValueError: a name or a letter that is taken or malformed, a shape of unknown sizes, or a range that is none.
    """
    letters: dict[str, str] = {}
    for one in lists:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", one.name) or one.name in (*BUILT_IN_LISTS, *letters.values()):
            raise ValueError(f"Listed {one.name!r}: its name must be a word of its own, such as 'pulse'")
        if not re.fullmatch(r"[A-Z]", one.letter) or one.letter in SIZES or one.letter in letters:
            raise ValueError(
                f"Listed {one.name!r}: its letter is {one.letter!r}; it must be a capital of its own, not one of "
                f"{', '.join([*SIZES, *letters])}"
            )
        if one.most < 1:
            raise ValueError(f"Listed {one.name!r}: most is {one.most}; it must be at least 1")
        letters[one.letter] = one.name
    names = set(taken)
    for field in (*fields, *(slots for one in lists for slots in one.fields())):
        if field.name in names:
            raise ValueError(f"field {field.name!r}: the name is taken; give it another")
        names.add(field.name)
    for field in fields:
        _check_field(field, letters, packed)
    for letter, name in letters.items():
        if not any(field.shape[0] == letter for field in fields):
            raise ValueError(f"Listed {name!r}: no field begins with its letter {letter}, so it would hold nothing")


def _check_field(field: Field, letters: dict[str, str], packed: bool) -> None:
    where, (stem, _, suffix) = f"field {field.name!r}", field.name.rpartition("_")
    firsts = ("R", "I", "A", *letters)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", stem) or not re.fullmatch(r"[A-Z]+", suffix):
        raise ValueError(f"{where}: its name must be words, `_` and a capital for each dimension, such as 'pulses_SN'")
    if not field.shape or field.shape[0] not in firsts:
        raise ValueError(f"{where}: its shape {field.shape} must begin with one of {', '.join(firsts)}")
    named = 2 if field.shape[:2] == ("R", "T") else 1
    if not all(isinstance(size, int) and size >= 1 for size in field.shape[named:]):
        raise ValueError(f"{where}: its shape {field.shape} must have numbers after {', '.join(field.shape[:named])}")
    if len(suffix) != len(field.shape) or tuple(suffix[:named]) != field.shape[:named]:
        raise ValueError(f"{where}: the capitals of its name are not the dimensions of its shape {field.shape}")
    if packed and field.shape[0] == "R" and named == 1:
        raise ValueError(
            f"{where}: a row of packed documents has no place for one value a row; declare a Listed, of which each "
            "document may have some, or a value a token (R, T)"
        )
    if field.dtype not in get_args(DType):
        raise ValueError(f"{where}: its dtype is {field.dtype!r}; it must be one of {', '.join(get_args(DType))}")
    if field.dtype in WHOLE and None in (field.low, field.high):
        raise ValueError(f"{where}: a field of whole numbers needs its range, low and high")
    if not math.isfinite(field.pad):
        raise ValueError(f"{where}: pad is {field.pad}; it must be a number that equals itself")
    if field.dtype in WHOLE:
        least, most = WHOLE[field.dtype]
        for name, value in (("low", field.low), ("high", field.high), ("pad", field.pad)):
            if not isinstance(value, str) and (value != int(value) or not least <= value <= most):
                raise ValueError(f"{where}: {name} is {value}, which {field.dtype} does not hold")
    if isinstance(field.high, str) and field.high != "T":  # an index into what a microbatch lists is what slots are
        raise ValueError(f"{where}: high is {field.high!r}; it must be a number, or 'T', a position in a row")
    if not isinstance(field.high, str) and None not in (field.low, field.high) and field.low > field.high:
        raise ValueError(f"{where}: its range is {field.low} … {field.high}; low must not be above high")
    if field.always:
        raise ValueError(f"{where}: always is for fields of the package; a node or a loss declares what it reads")
