"""A figure of the report, and the style of all: readable on white paper, on a dark screen and in greyscale.

Colour scales differ in lightness, lines also in dash and marker, and cells show their number where there is
room.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#1b1f27"  # text and lines; on the page it follows the reader's theme
QUIET = "#8b929c"  # grid, frames, remarks
LIGHT, DARK = "#ffffff", "#101418"  # numbers on cells
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b25c91", "#3b9bd6", "#c98a00", "#7a7a7a", "#7b4fb5")
MARKERS = "osD^vP*X<>hpdH8+"
DASHES = ("-", "--", "-.", ":")
STYLE: Mapping[str, Any] = {
    "font.family": "DejaVu Sans", "font.size": 8.5, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": QUIET, "xtick.color": INK, "ytick.color": INK, "axes.titlesize": 9.5,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlecolor": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": False, "grid.color": QUIET,
    "grid.alpha": 0.35, "grid.linewidth": 0.6, "legend.frameon": False, "figure.facecolor": "none",
    "axes.facecolor": "none", "savefig.facecolor": "none", "hatch.linewidth": 0.4, "svg.fonttype": "path",
    "axes.linewidth": 0.7, "xtick.major.width": 0.7, "ytick.major.width": 0.7, "lines.linewidth": 1.6,
    "text.parse_math": False,  # names may have dollar signs
}  # fmt: skip
WIDTH = 9.6  # inches of the widest picture
COLOUR_MAP = "viridis"  # lightness rises evenly, so it prints in greyscale


@dataclass(frozen=True)
class Picture:
    """A figure with its caption, text alternative and data."""

    stem: str  # of its files
    title: str
    words: str  # how to read it
    alt: str  # the text alternative, for screen readers
    figure: Figure
    header: Sequence[str]
    rows: Sequence[Sequence[str | float]]


def style() -> AbstractContextManager[None]:
    """Draw in the report's style; matplotlib's settings are restored afterwards."""
    return matplotlib.rc_context(cast(Any, STYLE))


def look(k: int) -> dict[str, Any]:
    """Colour, dash and marker of the k-th line."""
    return {
        "color": COLOURS[k % len(COLOURS)],
        "linestyle": DASHES[k % len(DASHES)],
        "marker": MARKERS[k % len(MARKERS)],
        "markersize": 4.5,
    }


def without_middle(name: str, length: int = 22) -> str:
    """A long name without its middle.

    >>> without_middle("a-very-long-name-of-an-expert", 12)
    'a-very…xpert'
    """
    if len(name) <= length:
        return name
    tail = (length - 1) // 2
    return f"{name[: length - 1 - tail]}…{name[-tail:]}"


def panels(
    count: int,
    width: float,
    height: float,
    margin: float = 1.0,
    share: tuple[bool, bool] = (True, True),
    below: float = 0.0,
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` axes of this size (inches), as many per row as fit on the page.

    `share`: whether all share the x scale and the y scale; `below` is room for long labels.
    """
    columns = max(1, min(count, 4, int((WIDTH - margin) / width)))
    rows = -(-count // columns)
    size = (max(4.2, columns * width + margin), rows * height + 0.55 + below)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=share[0], sharey=share[1])
    axes = list(grid.flat)
    for ax in axes[count:]:
        ax.remove()
    for ax in axes[max(0, count - columns) : count]:  # the last of each column has the scale
        ax.tick_params(labelbottom=True)
    return figure, axes[:count]
