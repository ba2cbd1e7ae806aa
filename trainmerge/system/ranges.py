"""Checks of settings: types and ranges, in one place for every dataclass and option.

A range is an interval as mathematics writes it: `(0, 1]`, `[0, inf)`. A closed end at infinity allows
infinity. Numbers without a range must be finite. NaN is never allowed, and true and false are no numbers.
"""

import collections.abc
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

FINITE = "(-inf, inf)"
LISTS = (collections.abc.Sequence, list, tuple)
MAPPINGS = (collections.abc.Mapping, dict)
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}


class Range(NamedTuple):
    """An interval of real numbers."""

    low: float
    high: float
    with_low: bool
    with_high: bool

    @staticmethod
    def of(text: str) -> "Range":
        """Parse it.

        >>> Range.of("(0, 1]")
        Range(low=0.0, high=1.0, with_low=False, with_high=True)
        """
        low, high = text[1:-1].split(",")
        return Range(float(low), float(high), text[0] == "[", text[-1] == "]")

    def __contains__(self, number: Any) -> bool:
        above = number >= self.low if self.with_low else number > self.low  # false for NaN
        return bool(above and (number <= self.high if self.with_high else number < self.high))

    def __str__(self) -> str:
        if math.isinf(self.high):
            if math.isinf(self.low):
                return "finite" if not self.with_high else "a number"
            least = f"at least {self.low:g}" if self.low else "0 or more"
            return least if self.with_low else f"above {self.low:g}"
        ends = "[" if self.with_low else "(", "]" if self.with_high else ")"
        return f"in {ends[0]}{self.low:g}, {self.high:g}{ends[1]}"


def check_fields(settings: Any, where: str = "", **ranges: str) -> None:
    """Check a dataclass's fields against their annotated types, and numbers against `ranges`.

    A range also applies to the numbers in a field's list or mapping. `where` is named before the field; by
    default the class.

    Raises:
        ValueError: lists every field with an unusable value.
    """
    where = where or type(settings).__name__
    kinds = hints(type(settings))
    unusable = []
    for field in fields(settings):
        value, interval = getattr(settings, field.name), ranges.get(field.name, FINITE)
        if problem := fault(value, kinds[field.name], interval):
            unusable.append(f"{where}.{field.name} must be {problem}")
    if unusable:
        raise ValueError("; ".join(unusable))


def check_option(name: str, value: object, kind: Any = float, interval: str = FINITE) -> None:
    """Check one value against a type, and its numbers against a range.

    Raises:
        ValueError: it is unusable.
    """
    if problem := fault(value, kind, interval):
        raise ValueError(f"{name} must be {problem}")


def fault(value: object, kind: Any, interval: str = FINITE) -> str:
    """What a value must be and what it is, or nothing where it is usable."""
    if isinstance(value, str) and not value.strip() and get_origin(kind) is not Literal:
        return f"a text that is not blank, not {value!r}"
    if not has_type(value, kind):
        return f"{described(kind)}, not {value!r}"
    allowed = Range.of(interval)
    outside = next((number for number in numbers(value) if number not in allowed), None)
    return "" if outside is None else f"{allowed}, not {outside!r}"


def hints(kind: Any) -> dict[str, Any]:
    """The types of a class's fields."""
    return get_type_hints(kind)


def has_type(value: Any, kind: Any) -> bool:
    """Whether a value has a type. Types that cannot be checked fit."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(has_type(value, each) for each in inner)
    if origin is Literal:
        return any(value == each and type(value) is type(each) for each in inner)
    if origin in LISTS:
        listed = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return listed and all(has_type(each, inner[0]) for each in value)
    if origin in MAPPINGS:
        return isinstance(value, Mapping) and all(has_type(each, inner[1]) for each in value.values())
    if kind in (int, float):
        number = Integral if kind is int else Real
        return isinstance(value, number) and not isinstance(value, bool)
    checkable = isinstance(kind, type) and origin is None and kind is not Any  # a class since Python 3.11
    return isinstance(value, kind) if checkable else True


def numbers(value: Any) -> Iterator[Real]:
    """The numbers in a value."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for each in value:
            yield from numbers(each)
    elif isinstance(value, Real) and not isinstance(value, bool):
        yield value


def described(kind: Any) -> str:
    """A type in words.

    >>> described(float | Sequence[str] | None)
    'a number, or a list (each a text), or null'
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return ", or ".join(described(each) for each in inner)
    if origin is Literal:
        return "one of " + ", ".join(str(each) for each in inner)
    if origin in LISTS:
        return f"a list (each {described(inner[0])})"
    if origin in MAPPINGS:
        return f"a mapping (each {described(inner[1])})"
    return WORDS.get(kind, f"a {getattr(kind, '__name__', kind)}")
