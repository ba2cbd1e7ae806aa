"""What pandas does with an irregular CSV file without a word, as errors."""

import csv
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def check_header(file: Path, columns: Sequence[str]) -> None:
    """Refuse two columns of one name that is read: pandas would take the first.

    Raises:
        ValueError: such a name.
    """
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        try:
            header = next((row for row in csv.reader(lines) if row), [])
        except csv.Error:  # a cell longer than this reader takes; the file's own reader says what it is
            return
    twice = [name for name in columns if header.count(name) > 1]
    if twice:
        raise ValueError(
            f"{file}: {header.count(twice[0])} columns are named {twice[0]!r}: rename all but one"
        )


@contextmanager
def no_cell_lost() -> Iterator[None]:
    """Refuse rows with more cells than the header has names; commas that only end each row are none.

    Raises:
        ValueError: such a row.
    """
    from pandas.errors import ParserWarning

    with warnings.catch_warnings():
        warnings.simplefilter("error", ParserWarning)
        try:
            yield
        except ParserWarning:
            raise ValueError(
                "its rows have more cells than its header has names: quote texts with commas, or name every "
                "column"
            ) from None  # whose cause would be said instead
