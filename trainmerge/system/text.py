"""Format lists of names, and texts of others in at most so many characters."""

import re
from collections.abc import Sequence

NO_NAME, SHOWN = 2000, 300  # characters of what is no name any more, and how many of it are shown


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


def words_of(error: BaseException) -> str:
    """An error's words as a command prints them: of the operating system's the file first and no number.

    A name that is longer than any path, as a damaged file may hold it, is cut.

    >>> words_of(PermissionError(13, "Permission denied", "/x/y"))
    '/x/y: Permission denied'
    """
    words = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        words = f"{error.filename}: {error.strerror}"
    return re.sub(rf"\S{{{NO_NAME},}}", lambda found: shortened(found[0], SHOWN), words)


def shortened(words: str, length: int) -> str:
    """The text's beginning.

    >>> shortened("abcdef", 3)
    'abc...'
    """
    return words if len(words) <= length else f"{words[:length]}..."
