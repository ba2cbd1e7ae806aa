"""The learned coefficients over blocks and experts, one panel per kind of module.

Legend: `K` experts, `G` coefficient groups, `L` blocks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor

from trainmerge.coefficients.layout import Layout
from trainmerge.report.heat import colour_bar, heat, label_axes, symmetric
from trainmerge.report.picture import INK, QUIET, WIDTH, Picture, panels, without_middle
from trainmerge.task_vectors.parameter_names import KINDS, OTHER, block_labels, block_of, kind_of, number_of

EVERYTHING = "all parameters of a block"


@dataclass(frozen=True)
class Grid:
    """The mean coefficient of each cell."""

    blocks: tuple[str, ...]  # L numbered blocks, in the network's order
    inside: Mapping[str, Tensor]  # kind -> [K, L]; NaN where a block has none of it
    outside: Mapping[str, Tensor]  # module outside the blocks -> [K]


def grid_of(layout: Layout, values: Tensor) -> Grid:
    """The mean coefficient per block and kind of module; per block only, if it has a single coefficient."""
    names = list(layout.groups)
    numbers = {name: number for name in names if (number := number_of(name))}
    places = {number: place for place, number in enumerate(sorted(set(numbers.values())))}
    whole = _one_per_block(layout)
    cells: dict[str, dict[int, list[int]]] = {}
    outside: dict[str, list[int]] = {}
    for name, groups in layout.groups.items():
        if name in numbers:
            kind = EVERYTHING if whole else kind_of(name)
            cells.setdefault(kind, {}).setdefault(places[numbers[name]], []).extend(groups)
        else:
            outside.setdefault(block_of(name), []).extend(groups)
    order = [EVERYTHING, *sorted(KINDS, key=lambda kind: (kind in ("bias", "norm"), 0)), OTHER]
    inside = {}
    for kind in (kind for kind in order if kind in cells):
        inside[kind] = torch.full((len(values), len(places)), torch.nan)
        for place, own in cells[kind].items():
            inside[kind][:, place] = values[:, own].mean(dim=1)
    means = {module: values[:, own].mean(dim=1) for module, own in outside.items()}
    labels = block_labels([f"{stack}.{number}" for stack, number in places])
    return Grid(tuple(labels), inside, means)


def _one_per_block(layout: Layout) -> bool:
    sets: dict[str, set[tuple[int, ...]]] = {}
    for name, groups in layout.groups.items():
        sets.setdefault(block_of(name), set()).add(tuple(groups))
    return all(len(groups) == 1 for groups in sets.values())


def heatmap(
    experts: Sequence[str], layout: Layout, values: Tensor, middle: float, learned: bool = True
) -> Picture:
    """A heat map of coefficients [K, G]; `middle`, their start, is the middle of the colour scale.

    With one coefficient per expert, a dot plot instead.
    """
    header = ["coefficient", *experts]
    rows = [[label, *column.tolist()] for label, column in zip(layout.labels, values.T, strict=True)]
    grid = grid_of(layout, values)
    single = len(layout.labels) == 1 or not (grid.inside or len(grid.outside) > 1)
    figure = _points(experts, values, middle) if single else _cells(experts, grid, middle)
    means = ", ".join(f"{name} {mean:.2f}" for name, mean in zip(experts, values.mean(dim=1), strict=True))
    from_ = f"the start, {middle:.2f}" if learned else f"the mean, {middle:.2f}"
    return Picture(
        "coefficients",
        "Coefficients",
        "The mean coefficient of each expert, per block and kind of module. The middle of the scale is "
        f"{from_}: darker cells are below it, lighter cells above. Hatched cells have no coefficients.",
        f"Heat map of coefficients between {values.min():.2f} and {values.max():.2f}. Means: {means}.",
        figure,
        header,
        rows,
    )


def _cells(experts: Sequence[str], grid: Grid, middle: float) -> Figure:
    K, L = len(experts), len(grid.blocks)
    outside = torch.stack(list(grid.outside.values()), dim=1) if grid.outside else torch.empty(K, 0)
    scale = symmetric(
        torch.cat([*(cells.flatten() for cells in grid.inside.values()), outside.flatten()]), middle
    )
    longest = max(len(without_middle(name)) for name in experts)
    margin, wide = 0.07 * longest, max(L, outside.shape[1], 1)
    cell = 0.44 if wide <= 14 else min(0.3, (WIDTH - margin - 0.3) / wide)
    count = len(grid.inside) + bool(grid.outside)
    below = 0.06 * max((len(without_middle(name, 26)) for name in grid.outside), default=0)
    size = max(1.7, cell * wide + 0.2), K * 0.25 + 0.42
    figure, axes = panels(count, *size, margin, (False, True), below)
    for ax, (kind, cells) in zip(axes, grid.inside.items(), strict=False):
        heat(ax, cells, scale, cell=cell)
        ax.set_title(kind)
        label_axes(ax, experts, grid.blocks)
        ax.set_xlabel("block", labelpad=1, size=7.5)
    if grid.outside:
        ax = axes[-1]
        heat(ax, outside, scale, cell=cell)
        ax.set_title("outside the blocks")
        label_axes(ax, experts, list(grid.outside))
    colour_bar(figure, axes, scale, f"coefficient (start {middle:.2f} in the middle)")
    return figure


def _points(experts: Sequence[str], values: Tensor, middle: float) -> Figure:
    """One coefficient per expert: a dot each, with a line from its start."""
    figure = Figure(figsize=(6.4, 0.34 * len(experts) + 0.9), layout="constrained")
    ax = figure.subplots()
    places = range(len(experts))
    means = values.mean(dim=1).tolist()
    ax.axvline(middle, color=QUIET, linestyle="--", linewidth=1)
    ax.hlines(places, [middle] * len(experts), means, color=QUIET, linewidth=3)
    ax.plot(means, places, "o", color=INK, markersize=6)
    for place, mean in zip(places, means, strict=True):
        ax.annotate(f"{mean:.3f}", (mean, place), (0, 6), textcoords="offset points", ha="center", size=7.5)
    ax.set_yticks(list(places), [without_middle(name) for name in experts])
    ax.set(ylim=(len(experts) - 0.4, -0.75), xlabel=f"coefficient (dashed: {middle:.2f})")
    ax.margins(x=0.15)
    return figure
