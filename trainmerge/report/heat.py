"""A heat map, its colour bar, and its row and column labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from trainmerge.report.picture import COLOUR_MAP, DARK, LIGHT, QUIET, without_middle


def symmetric(values: Tensor, middle: float, least: float = 1e-3) -> Normalize:
    """A colour scale that is symmetric about `middle` and covers all finite values."""
    finite = values[values.isfinite()]
    reach = float((finite - middle).abs().max()) if finite.numel() else 0.0
    reach = max(reach, least)
    return Normalize(middle - reach, middle + reach)


def heat(
    ax: Axes,
    values: Tensor,
    scale: Normalize,
    colours: str = COLOUR_MAP,
    number: str = "{:.2f}",
    cell: float = 0.5,
) -> QuadMesh:
    """A heat map of [rows, columns], the first row on top; cells of `cell` >= 0.34 inches show their number.

    Non-finite cells are hatched.
    """
    data = np.ma.masked_invalid(values.numpy())
    rows, columns = data.shape
    if data.mask.any():
        ax.add_patch(
            Rectangle((0, 0), columns, rows, facecolor="none", edgecolor=QUIET, hatch="////", linewidth=0)
        )
    mesh = ax.pcolormesh(data, cmap=colours, norm=scale, edgecolors="face", linewidth=0.3)
    ax.set(xlim=(0, columns), ylim=(rows, 0))
    ax.tick_params(length=0)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    if cell >= 0.34:
        size = 7.0 if cell >= 0.42 else 6.0
        for (row, column), value in np.ndenumerate(values.numpy()):
            if np.isfinite(value):
                dark = _lightness(colormaps[colours](scale(value))) > 0.5
                ax.text(
                    column + 0.5, row + 0.5, signless(number.format(value)), ha="center",
                    va="center_baseline", size=size, color=DARK if dark else LIGHT,
                )  # fmt: skip
    return mesh


def signless(number: str) -> str:
    """A zero without its sign.

    >>> signless("-0.00"), signless("-0.01")
    ('0.00', '-0.01')
    """
    return number if float(number) else number.lstrip("-")


def label_axes(ax: Axes, rows: Sequence[str], columns: Sequence[str], shift: float = 0.5) -> None:
    """Row and column labels. Long ones are rotated; with more than 24 columns only some are labelled."""
    if rows:
        ax.set_yticks(np.arange(len(rows)) + shift, [without_middle(row, 26) for row in rows])
    long = any(len(name) > 5 for name in columns)
    places = range(0, len(columns), max(1, -(-len(columns) // 24)))
    slope: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if long else {}
    ax.set_xticks([i + shift for i in places], [without_middle(columns[i], 26) for i in places], **slope)


def colour_bar(
    figure: Figure, axes: Sequence[Axes], scale: Normalize, label: str, colours: str = COLOUR_MAP
) -> None:
    """The colour bar, below all axes."""
    bar = figure.colorbar(
        ScalarMappable(scale, colours), ax=list(axes), location="bottom", shrink=0.5, aspect=45, pad=0.03
    )
    bar.set_label(label)
    bar.outline.set_visible(False)


def _lightness(colour: Sequence[float]) -> float:
    red, green, blue = (float(part) for part in colour[:3])
    return 0.3 * red + 0.59 * green + 0.11 * blue
