"""Numbers as tables: Rich ones for a terminal, Markdown for files."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track
from rich.table import Table

T = TypeVar("T")


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print to the terminal; the first column is text, the others are right-aligned."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    Console(width=None if console.is_terminal else 140).print(table)


def progress(items: Sequence[T], description: str, disable: bool = False) -> Iterator[T]:
    """The items, with a progress bar on a terminal and one line per finished item elsewhere."""
    if disable or Console(stderr=True).is_terminal:
        yield from track(items, description=description, disable=disable)
        return
    begun = time.monotonic()
    for count, item in enumerate(items, 1):
        yield item
        left = (time.monotonic() - begun) / count * (len(items) - count)
        print(
            f"{description}: {item}, {count} of {len(items)}, {left:.0f} s left", file=sys.stderr, flush=True
        )
