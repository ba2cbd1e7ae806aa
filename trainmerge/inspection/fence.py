"""A fence around each finding: what cannot be said is one finding, and the rest is printed."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from trainmerge.inspection.findings import Finding

T = TypeVar("T")


def fenced(what: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of a check; if it fails, those before it failed, and the reason."""
    found: list[Finding] = []
    try:
        for finding in check():
            found.append(finding)
    except Exception as error:  # of any type: models differ, and one check must not stop the others
        found.append(failure(what, error))
    return found


def attempt(what: str, make: Callable[[], T]) -> tuple[T | None, list[Finding]]:
    """A value; if it cannot be made, None and the reason."""
    try:
        return make(), []
    except Exception as error:  # as above
        return None, [failure(what, error)]


def failure(what: str, error: Exception) -> Finding:
    """The finding that a check failed, on one line."""
    text = " ".join(str(error).split()) or "no reason given"
    return Finding("warning", f"{what} could not be checked: {type(error).__name__}: {text}")
