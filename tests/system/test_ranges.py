"""Types and ranges of settings, and their words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest

from trainmerge.system.ranges import Range, check_fields, check_option, fault


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "words"),
    [
        ("(0, 1]", (0.5, 1, 1e-300), (0, -1, 1.1, math.nan, math.inf), "in (0, 1]"),
        ("[0, 1)", (0, 0.999), (1, -1e-300, math.nan), "in [0, 1)"),
        ("[0, inf)", (0, 1e308, 10**400), (-1, math.inf, math.nan), "0 or more"),
        ("[0, inf]", (0, math.inf), (-1, math.nan), "0 or more"),
        ("(0, inf)", (1e-300,), (0, math.inf, math.nan), "above 0"),
        ("[1, inf)", (1, 2), (0, math.nan), "at least 1"),
        ("(-inf, inf)", (-1e308, 0), (math.inf, -math.inf, math.nan), "finite"),
        ("(-inf, inf]", (0, math.inf), (-math.inf, math.nan), "a number"),
    ],
)
def test_an_interval(interval: str, inside: tuple, outside: tuple, words: str) -> None:
    found = Range.of(interval)
    assert all(number in found for number in inside)
    assert not any(number in found for number in outside)
    assert str(found) == words


@dataclass(frozen=True)
class Settings:
    share: float = 0.5
    count: int | None = None
    flag: bool = False
    kind: Literal["a", "b"] = "a"
    name: str = "x"
    names: Sequence[str] = ()
    sizes: Mapping[str, float] | float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, share="[0, 1]", count="[1, inf)", sizes="(0, inf)")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"share": True}, "Settings.share must be a number, not True"),
        ({"share": "0.5"}, "Settings.share must be a number, not '0.5'"),
        ({"share": 2}, "Settings.share must be in [0, 1], not 2"),
        ({"count": 1.5}, "Settings.count must be a whole number, or null, not 1.5"),
        ({"count": 0}, "Settings.count must be at least 1, not 0"),
        ({"flag": 1}, "Settings.flag must be true or false, not 1"),
        ({"kind": "c"}, "Settings.kind must be one of a, b, not 'c'"),
        ({"name": " "}, "Settings.name must be a text that is not blank, not ' '"),
        ({"name": 5}, "Settings.name must be a text, not 5"),
        ({"names": "abc"}, "Settings.names must be a list (each a text), not 'abc'"),
        ({"names": ["a", 5]}, "Settings.names must be a list (each a text), not ['a', 5]"),
        ({"sizes": {"x": -1.0}}, "Settings.sizes must be above 0, not -1.0"),
        ({"sizes": {"x": True}}, "Settings.sizes must be a mapping (each a number), or a number, not {"),
        ({"share": -1, "flag": "no"}, "Settings.share must be in [0, 1], not -1; Settings.flag must be true"),
    ],
)  # fmt: skip
def test_unusable_fields_are_listed_in_words(given: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - compared below
        Settings(**given)
    assert str(error.value).startswith(message)


def test_numbers_of_other_libraries_are_numbers() -> None:
    Settings(share=np.float32(0.5), count=np.int64(3), sizes={"x": np.float64(2)})
    with pytest.raises(ValueError, match="must be in"):
        Settings(share=np.float32("nan"))


def test_an_option_without_a_range_must_be_finite() -> None:
    check_option("x", 3)
    with pytest.raises(ValueError, match="x must be finite, not nan"):
        check_option("x", math.nan)
    assert fault([1.0, math.inf], Sequence[float]) == "finite, not inf"
    assert not fault(object(), object)
