"""Names of experts and tasks: keys of files, and words in tables and pictures."""

from collections.abc import Iterable

LONGEST_NAME = 120  # characters


def check_names(names: Iterable[object]) -> None:
    """Check that each can be shown in a table, a picture and a file.

    Raises:
        ValueError: a name that is not a text, blank, `base`, not printable or too long.
    """
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"recipe: the name {name!r} is not a text: write '{name}', with quotes")
        if name in ("", "base"):
            raise ValueError(f"recipe: [{name!r}] are not valid names of experts or tasks")
        if not name.strip() or not name.isprintable() or len(name) > LONGEST_NAME:
            raise ValueError(
                f"recipe: {ascii(name)[:80]} is not a valid name of an expert or task: use at most "
                f"{LONGEST_NAME} printable characters"
            )
