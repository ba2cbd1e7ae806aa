"""Numbers as tables: Rich ones for a terminal, Markdown for files."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print to the terminal; the first column is text, the others are right-aligned."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    Console(width=None if console.is_terminal else 140).print(table)


def score_rows(
    title: str,
    rows: Mapping[str, Mapping[str, float]],
    means: Mapping[str, float],
    normalised: Mapping[str, float],
) -> tuple[list[str], list[list[str]]]:
    """Header and cells: a task a column, then mean and normalised mean."""
    tasks = list(next(iter(rows.values())))
    header = [title, *tasks, "mean", "norm."]
    cells = [
        [row, *(f"{scores[task]:.3f}" for task in tasks), f"{means[row]:.3f}",
         f"{normalised[row]:.3f}" if row in normalised else ""]
        for row, scores in rows.items()
    ]  # fmt: skip
    return header, cells
