"""Format lists of names."""

from collections.abc import Sequence


def listed(names: Sequence[str], most: int = 3) -> str:
    """The names, or the first few and the number of others.

    >>> listed(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def reason(error: BaseException, length: int = 600) -> str:
    """A foreign error in at most so many characters: its words, or its type if it has none."""
    words = str(error).strip() or type(error).__name__
    return words if len(words) <= length else f"{words[:length]}..."
