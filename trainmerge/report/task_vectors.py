"""How the experts' task vectors compare: cosines, norms, signs.

Legend: `K` experts, `L` blocks.
"""

from collections.abc import Sequence
from itertools import combinations

import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from trainmerge.report.heat import colour_bar, heat, label_axes, symmetric
from trainmerge.report.picture import INK, QUIET, WIDTH, Picture, without_middle
from trainmerge.task_vectors.geometry import Geometry
from trainmerge.task_vectors.parameter_names import block_labels, block_of, number_of

LEAST = 0.1  # cosine at the darkest colour, at least: smaller ones are nearly orthogonal

PAIRS = 15  # of experts, shown per block


def blocks_of(geometry: Geometry) -> dict[str, Geometry]:
    """Block -> sums over its parameters, in the network's order."""
    members: dict[str, list[str]] = {}
    for name in sorted(geometry.names, key=lambda name: number_of(name) or ("", -1)):
        members.setdefault(block_of(name), []).append(name)
    return {block: geometry.of(names) for block, names in members.items()}


def similarity_picture(experts: Sequence[str], geometry: Geometry) -> Picture:
    """Cosine similarity of each pair of task vectors: over all weights, and per block."""
    K, blocks = len(experts), blocks_of(geometry)
    whole = geometry.of(geometry.names).cosines()[0]
    each = torch.stack([block.cosines()[0] for block in blocks.values()])  # [L, K, K]
    pairs = sorted(combinations(range(K), 2), key=lambda pair: -abs(float(whole[pair])))
    shown = pairs[:PAIRS]
    lines = torch.stack([each[:, i, j] for i, j in shown]) if shown else torch.empty(0, len(blocks))
    off = whole[~torch.eye(K, dtype=torch.bool)]
    scale = symmetric(torch.cat([off, lines.flatten()]), 0.0, LEAST)
    figure, left, right = _two_panels(K, len(blocks), len(shown))
    heat(
        left, whole.masked_fill(torch.eye(K, dtype=torch.bool), torch.nan), scale, cell=0.42 if K <= 10 else 0
    )
    left.set_title("all weights")
    label_axes(left, experts, experts)
    heat(right, lines, scale, cell=0.42 if len(blocks) <= 14 else 0)
    right.set_title("per block" + (f", {PAIRS} of {len(pairs)} pairs" if len(pairs) > PAIRS else ""))
    names = [f"{without_middle(experts[i], 11)} · {without_middle(experts[j], 11)}" for i, j in shown]
    label_axes(right, names, block_labels(list(blocks)))
    colour_bar(figure, [left, right], scale, "cosine similarity (0 in the middle)")
    i, j = pairs[0] if pairs else (0, 0)
    top = f"{experts[i]} and {experts[j]}, {float(whole[i, j]):.2f}" if pairs else "none"
    return Picture(
        "similarity",
        "Similarity of the task vectors",
        "Near 0, two task vectors are nearly orthogonal and both fit into one model. Near 1, they are nearly "
        "parallel: adding both doubles the same change. Below 0, they partly cancel each other.",
        f"Heat maps of cosines between the experts' task vectors. The most similar: {top}.",
        figure,
        ["block", "expert", "other", "cosine"],
        [
            [block, experts[i], experts[j], float(cosines[i, j])]
            for block, cosines in [("all", whole), *zip(blocks, each, strict=True)]
            for i, j in pairs
        ],
    )


def _two_panels(experts: int, blocks: int, pairs: int) -> tuple[Figure, Axes, Axes]:
    """A figure with a square map of experts, and one of pairs and blocks."""
    square, wide = max(1.6, min(3.4, 0.42 * experts)), max(2.4, min(4.0, 0.42 * blocks))
    height = max(0.36 * experts, 0.27 * pairs) + 1.5
    figure = Figure(figsize=(min(WIDTH, square + wide + 3.4), height), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(square, wide))
    return figure, left, right


def norm_picture(experts: Sequence[str], geometry: Geometry) -> Picture:
    """The norm of each task vector relative to the base, and the share of sign conflicts, per block."""
    blocks = blocks_of(geometry)
    norms = torch.stack([block.relative_norms()[0] for block in blocks.values()], dim=1)  # [K, L]
    conflicts = torch.stack([_mean_pair(block.conflicts()[0]) for block in blocks.values()])  # [L]
    L = len(blocks)
    figure = Figure(
        figsize=(min(WIDTH, max(5.6, 0.5 * L + 2.2)), 0.27 * len(experts) + 3.6), layout="constrained"
    )
    top, bottom = figure.subplots(2, 1, height_ratios=(0.27 * len(experts) + 0.3, 1.5))
    finite = 100 * norms[norms.isfinite()]
    scale = Normalize(0, max(float(finite.max()) if finite.numel() else 0.0, 1e-6))
    heat(top, 100 * norms, scale, number="{:.1f}", cell=0.42 if L <= 18 else 0)
    top.set_title("norm of the task vector, in % of the base's norm")
    names = block_labels(list(blocks))
    label_axes(top, experts, names)
    _draw_conflicts(bottom, conflicts, names)
    whole = geometry.of(geometry.names)
    far = ", ".join(
        f"{name} {100 * n:.2f}%" for name, n in zip(experts, whole.relative_norms()[0].tolist(), strict=True)
    )
    return Picture(
        "norms",
        "Norms and sign conflicts",
        "Top: ||expert - base|| / ||base|| per block. An expert with a much larger norm dominates the others "
        "at equal coefficients. Bottom: of the entries that two experts both change, the share with opposite "
        "signs, mean over pairs. Random signs give one half; less means agreement.",
        f"A heat map of relative norms ({far} over all weights) and bars of sign conflicts.",
        figure,
        ["block", *(f"length, {name}" for name in experts), "opposed"],
        [
            [block, *norms[:, place].tolist(), float(conflicts[place])]
            for place, block in enumerate(blocks)
        ],
    )  # fmt: skip


def _draw_conflicts(axes: Axes, conflicts: Tensor, names: Sequence[str]) -> None:
    """Bars of the sign conflicts [L] of the blocks `names`."""
    heights, L = conflicts.nan_to_num(0).tolist(), len(conflicts)
    axes.bar(range(L), heights, width=0.7, color=QUIET, edgecolor=INK, hatch="//", linewidth=0.6)
    axes.axhline(0.5, color=INK, linestyle="--", linewidth=1)
    axes.annotate("chance", (L - 0.5, 0.5), (0, 3), textcoords="offset points", ha="right", size=7.5)
    axes.set(ylim=(0, max(0.65, 1.1 * max(heights))), xlim=(-0.5, L - 0.5))
    axes.set_title("sign conflicts, share of entries")
    label_axes(axes, (), names, shift=0)


def _mean_pair(matrix: Tensor) -> Tensor:
    """Mean over pairs of experts, without NaN."""
    pairs = matrix[torch.triu_indices(len(matrix), len(matrix), offset=1).unbind()]
    return pairs.nanmean()
