"""The rows of a batch's inputs that belong to each example.

Texts have one row per example. Pictures may have more: one per patch (Qwen2-VL) or per tile (InternVL).

Legend: `B` examples.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

GRIDS = ("_grid_thw", "_grid_hw")  # transformers' names of [B, 3] and [B, 2]: a picture's patches per axis


def row_counts(
    inputs: Mapping[str, Tensor], examples: int, known: Mapping[str, Sequence[int]]
) -> dict[str, Sequence[int] | None]:
    """Input -> the number of its rows that belong to each of the B examples, in order; None if unknown.

    `known` counts come first. Otherwise an input with B rows has one per example, and one whose rows are a
    grid's patches has those; of several such grids, that of videos if the input is one of videos, else
    that of images.
    """
    patches = {
        name: tuple(grid.prod(-1).tolist())
        for name, grid in inputs.items()
        if name.endswith(GRIDS) and grid.dim() == 2 and len(grid) == examples
    }

    def counts(name: str, value: Tensor) -> Sequence[int] | None:
        if name in known or not value.dim():
            return known.get(name)
        rows = len(value)
        if rows == examples or examples == 1:
            return [rows // examples] * examples
        fitting = {grid: found for grid, found in patches.items() if sum(found) == rows}
        kind = "video" if "video" in name else "image"
        own = {grid: found for grid, found in fitting.items() if grid.startswith(kind)} or fitting
        return next(iter(own.values())) if len({*own.values()}) == 1 else None

    return {name: counts(name, value) for name, value in inputs.items()}


def split_rows(
    inputs: Mapping[str, Tensor], examples: int, known: Mapping[str, Sequence[int]], size: int
) -> list[dict[str, Tensor]]:
    """The inputs of each `size` examples in turn.

    Raises:
        ValueError: an input whose rows cannot be assigned to examples.
    """
    counts = row_counts(inputs, examples, known)
    wrong = [n for n, rows in counts.items() if rows is None or sum(rows) != len(inputs[n])]
    if wrong:
        shapes = ", ".join(f"{name} {tuple(inputs[name].shape)}" for name in wrong)
        raise ValueError(
            f"a batch of {examples} examples cannot be split into parts of {size}: {shapes} has neither one "
            "row per example nor a known number of them. Raise `memory`, or set data.batch_size to "
            f"{size}, so that no batch is split"
        )
    parts: list[dict[str, Tensor]] = [{} for _ in range(0, examples, size)]
    for name, rows in counts.items():
        assert rows is not None
        sizes = [sum(rows[first : first + size]) for first in range(0, examples, size)]
        for part, values in zip(parts, torch.split(inputs[name], sizes), strict=True):
            part[name] = values
    return parts
