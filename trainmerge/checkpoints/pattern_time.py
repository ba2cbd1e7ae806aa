r"""Whether a regular expression is matched in bounded time by Python's backtracking matcher.

k unlimited repetitions one after another take at most length^k steps. A repetition within a repetition, or
one of alternatives, may take exponentially many: `(a+)+` divides a word in 2^length ways. It takes no more
than a plain one if every character leaves one way only, as in `(\w+\.)*`: positions of the repeated
expression that may follow one another must accept different characters (one-unambiguous expressions:
Brueggemann-Klein and Wood, 1998; here with the number of ways, since a matcher tries each).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import inf
from re import _compiler as compiler  # type: ignore[attr-defined]
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

MOST = 5  # unlimited repetitions of one pattern
ALPHABET = [chr(code) for code in range(128)]  # of the names of modules
REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT)
SINGLE = (codes.LITERAL, codes.NOT_LITERAL, codes.IN, codes.ANY)  # what accepts one character


def pattern_problem(pattern: str) -> str | None:
    """Why a pattern is not used: no regular expression, or no bound on its time; None if it is sound."""
    try:
        parsed = parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"is not a regular expression ({error})"
    try:
        repeats = _repeats(parsed)
    except RecursionError:
        return "is nested too deeply"
    return None if repeats <= MOST else "may take forever to match"


def _repeats(tree: Any, plain: bool = True) -> float:
    """Unlimited repetitions that one match may pass through; infinity for an ambiguous one within another.

    `plain`: outside groups with flags of their own, whose characters `_Positions` does not know.
    """
    total = 0.0
    for code, content in tree:
        if code is codes.BRANCH:
            total += max(_repeats(branch, plain) for branch in content[1])
        elif code in REPEATS:
            _, most, inner = content
            nested = _repeats(inner, plain)
            if most is codes.MAXREPEAT or most > MOST:
                ambiguous = (nested or _branches(inner)) and not (plain and _is_unambiguous(inner))
                total += inf if ambiguous else 1
            else:
                total += max(most, 1) * nested
        else:
            own = plain and not (code is codes.SUBPATTERN and (content[1] or content[2]))
            total += sum(_repeats(part, own) for part in _parts(content))
    return total


def _branches(tree: Any) -> bool:
    """Whether it has alternatives, which a repetition may combine in exponentially many ways."""
    return any(
        code is codes.BRANCH or any(_branches(part) for part in _parts(content)) for code, content in tree
    )


def _parts(content: Any) -> list[Any]:
    parts = content if isinstance(content, tuple | list) else [content]
    return [part for part in parts if isinstance(part, parser.SubPattern)]


@dataclass(frozen=True)
class _Ways:
    """The positions at which an expression begins and ends; positions are numbers of single characters."""

    empty: bool  # whether it accepts nothing
    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()


@dataclass
class _Positions:
    """The single characters of an expression, and after each, every way to a next one."""

    accepts: list[frozenset[str]] = field(default_factory=list)
    after: list[list[int]] = field(default_factory=list)

    def link(self, last: Sequence[int], first: Sequence[int]) -> None:
        """Let each of `first` follow each of `last`, one way more."""
        for position in last:
            self.after[position] += first

    def single(self, item: Any, tree: Any) -> _Ways:
        """A new position, for an item that accepts one character."""
        accepted = compiler.compile(parser.SubPattern(tree.state, [item])).fullmatch
        self.accepts.append(frozenset(filter(accepted, ALPHABET)))
        self.after.append([])
        place = (len(self.accepts) - 1,)
        return _Ways(False, place, place)

    def distinct(self, places: Sequence[int]) -> bool:
        """Whether no character is accepted by two of these ways."""
        return not any(self.accepts[a] & self.accepts[b] for a, b in combinations(places, 2))


def _is_unambiguous(inner: Any) -> bool:
    """Whether an unlimited repetition of an expression reads every text in one way at most."""
    positions = _Positions()
    try:
        ways = _sequence(inner, positions)
    except NotImplementedError:
        return False
    positions.link(ways.last, ways.first)
    return not ways.empty and all(map(positions.distinct, [ways.first, *positions.after]))


def _sequence(tree: Any, positions: _Positions) -> _Ways:
    whole = _Ways(True)
    for one in (_item(item, tree, positions) for item in tree):
        positions.link(whole.last, one.first)
        whole = _Ways(
            whole.empty and one.empty,
            (*whole.first, *one.first) if whole.empty else whole.first,
            (*whole.last, *one.last) if one.empty else one.last,
        )
    return whole


def _item(item: Any, tree: Any, positions: _Positions) -> _Ways:
    """One item's ways. Raises NotImplementedError for what has no positions: references, looking ahead."""
    code, content = item
    if code in SINGLE:
        return positions.single(item, tree)
    if code is codes.AT:  # the end of a word, of the name
        return _Ways(True)
    if code is codes.BRANCH:
        return _either([_sequence(branch, positions) for branch in content[1]])
    if code is codes.SUBPATTERN and not content[1] and not content[2]:  # without flags of its own
        return _sequence(content[3], positions)
    if code in REPEATS:
        least, most, inner = content
        ways = _sequence(inner, positions)
        if most > 1:
            if ways.empty:
                raise NotImplementedError
            positions.link(ways.last, ways.first)
        return _Ways(ways.empty or not least, ways.first, ways.last)
    raise NotImplementedError


def _either(branches: Sequence[_Ways]) -> _Ways:
    def all_of(name: str) -> Iterator[int]:
        return (place for branch in branches for place in getattr(branch, name))

    return _Ways(any(branch.empty for branch in branches), tuple(all_of("first")), tuple(all_of("last")))
