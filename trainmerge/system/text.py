"""Format lists of names, and texts of others in at most so many characters."""

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
    return shortened(str(error).strip() or type(error).__name__, length)


def shortened(words: str, length: int) -> str:
    """The text's beginning.

    >>> shortened("abcdef", 3)
    'abc...'
    """
    return words if len(words) <= length else f"{words[:length]}..."
