"""What a setting may hold: one check a kind of value, and one form of message.

A check is called with (where, field, value). It returns the value as plain Python (NumPy's numbers become int and float) or raises
ValueError with `<where>: <field>: expected <what>, got <what>`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, NoReturn

Check = Callable[[str, str, Any], Any]

# Lengths are 32-bit, so a larger count of tokens means the same: everything.
MOST_TOKENS = 2**31 - 1


def refuse(where: str, field: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{where}: {field}: expected {expected}, got {got!r}")


def normalise(record: object, **checks: Check) -> None:
    """Runs each check on the field of its name of a (frozen) record, and stores what it returns."""
    where = type(record).__name__
    # All of them first: a record that is refused stays as it was.
    values = {field: check(where, field, getattr(record, field)) for field, check in checks.items()}
    for field, value in values.items():
        object.__setattr__(record, field, value)


def integer(least: int, most: int | None = None, multiple_of: int = 1) -> Check:
    """A whole number, no bool and no float."""
    limits = f">= {least}" if most is None else f"{least}..{most}"
    expected = limits
    if multiple_of > 1:
        expected = f"a positive multiple of {multiple_of}" + ("" if most is None else f", at most {most}")

    def check(where: str, field: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral):
            refuse(where, field, f"an integer {limits}" if multiple_of == 1 else expected, value)
        if value < least or (most is not None and value > most) or value % multiple_of:
            refuse(where, field, expected, value)
        return int(value)

    return check


def tokens(least: int) -> Check:
    """A number of tokens; whatever is larger than any length, `sys.maxsize` for one, is `MOST_TOKENS`."""
    whole = integer(least)
    return lambda where, field, value: min(whole(where, field, value), MOST_TOKENS)


def number(least: float | None = None, most: float | None = None, above: float | None = None, below: float | None = None) -> Check:
    """A finite number, no bool; `least` and `most` belong to the range, `above` and `below` do not."""

    def check(where: str, field: str, value: object) -> float:
        if most is None and below is None:
            expected = f">= {least:g}" if above is None else f"> {above:g}"
        elif least is not None and most is not None:
            expected = f"{least:g}..{most:g}"
        else:
            low = f"{above:g} <" if least is None else f"{least:g} <="
            high = f"< {below:g}" if most is None else f"<= {most:g}"
            expected = f"{low} {field} {high}"
        if isinstance(value, bool) or not isinstance(value, Real):
            refuse(where, field, f"a number {expected}", value)
        # NaN compares false with everything, so each limit is asked for and not its opposite.
        inside = (
            abs(value) < float("inf")
            and (least is None or value >= least)
            and (most is None or value <= most)
            and (above is None or value > above)
            and (below is None or value < below)
        )
        if not inside:
            refuse(where, field, expected, value)
        return float(value)

    return check


def share() -> Check:
    """p of a top-p: 0 < p <= 1."""
    return number(above=0.0, most=1.0)


def flag(where: str, field: str, value: object) -> bool:
    if type(value).__name__ not in ("bool", "bool_"):
        refuse(where, field, "True or False", value)
    return bool(value)


def one_of(*choices: int | str) -> Check:
    """One of a few integers or strings."""
    shown = [f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in choices]
    expected = f"{', '.join(shown[:-1])} or {shown[-1]}"

    def check(where: str, field: str, value: object) -> int | str:
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not (whole or isinstance(value, str)) or value not in choices:
            refuse(where, field, expected, value)
        return int(value) if whole else str(value)

    return check


def path(where: str, field: str, value: object) -> str:
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        refuse(where, field, "the path of a file", value)
    return str(os.fspath(value))


def optional(check: Check) -> Check:
    """None, or what `check` takes."""
    return lambda where, field, value: None if value is None else check(where, field, value)


def each(check: Check) -> Check:
    """A sequence of what `check` takes, as a tuple; NumPy arrays and tensors of one dimension are sequences too."""

    def entries(where: str, field: str, value: object) -> tuple:
        listed = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(listed, str | bytes) or not isinstance(listed, Sequence) or not listed:
            refuse(where, field, "a sequence with at least one entry", value)
        return tuple(check(where, f"{field}[{index}]", entry) for index, entry in enumerate(listed))

    return entries


def of_length(where: str, field: str, value: Sequence, length: int, what: str) -> None:
    """Refuses a sequence of another length, once it is known how many there have to be."""
    if len(value) != length:
        refuse(where, field, f"{length} entries, one a {what}", len(value))
