"""Which parameters the merge changes most, and how many chunks each has."""

from matplotlib.figure import Figure
from torch import Tensor

from trainmerge.coefficients.layout import Layout
from trainmerge.report.picture import COLOURS, INK, Picture, without_middle
from trainmerge.task_vectors.geometry import Geometry

SHOWN = 16


def magnitudes(layout: Layout, values: Tensor, geometry: Geometry) -> dict[str, float]:
    """I_l = sum_k |c_kl| ||tau_kl||_1 of each merged parameter, summing to one (arXiv 2509.25712).

    As `coefficients.chunk_allocation.magnitude`, from sums computed earlier; all zero if no weight changes.
    """
    places = {name: place for place, name in enumerate(geometry.names)}
    weights = {name: values[:, list(groups)].abs().mean(dim=1) for name, groups in layout.groups.items()}
    raw = {name: float(weight.double() @ geometry.sizes[places[name]]) for name, weight in weights.items()}
    total = sum(raw.values()) or 1.0
    return {name: size / total for name, size in raw.items()}


def importance_picture(layout: Layout, values: Tensor, geometry: Geometry) -> Picture:
    """The parameters that the merge changes most, with their numbers of coefficients."""
    importance = magnitudes(layout, values, geometry)
    order = sorted(importance, key=lambda name: -importance[name])
    shown = order[:SHOWN]
    figure = Figure(figsize=(8.6, 0.24 * len(shown) + 1.0), layout="constrained")
    ax = figure.subplots()
    ax.barh(range(len(shown)), [100 * importance[name] for name in shown], color=COLOURS[0], height=0.66)
    learned = {name: _learned(layout, name) for name in order}
    several = set(learned.values()) != {"1"}
    for place, name in enumerate(shown) if several else ():
        ax.annotate(
            learned[name], (100 * importance[name], place), (4, 0), textcoords="offset points",
            va="center", size=7.5, color=INK,
        )  # fmt: skip
    ax.set_yticks(range(len(shown)), [without_middle(name, 52) for name in shown], size=7.5)
    ax.set(ylim=(len(shown) - 0.4, -0.6), xlabel="importance, in % of the total")
    ax.margins(x=0.14)
    ax.grid(axis="x")
    ax.set_axisbelow(True)
    chunks = [len(layout.groups[name]) for name in order]
    half = _until_half([importance[name] for name in order])
    return Picture(
        "importance",
        "Importance and chunks",
        "A parameter's importance is the sum over experts of |coefficient| x ||task vector||₁ (Expert "
        f"Merging++): {half} of {len(order)} parameters account for half of the total. "
        + ("Next to each bar: its number of coefficients per expert. " if several else "")
        + "`trainmerge allocate` gives important parameters more coefficients.",
        f"A bar chart of the {len(shown)} most important parameters; {min(chunks)} to {max(chunks)} chunks "
        "each.",
        figure,
        ["parameter", "importance", "chunks", "learned"],
        [[name, importance[name], len(layout.groups[name]), learned[name]] for name in order],
    )


def _learned(layout: Layout, name: str) -> str:
    groups = layout.groups[name]
    if set(groups) <= set(layout.fixed):
        return "kept"
    return f"{len(groups)} chunks" if len(groups) > 1 else "1"


def _until_half(shares: list[float]) -> int:
    """How many of the largest shares sum to one half."""
    total = 0.0
    for count, share in enumerate(shares, start=1):
        total += share
        if total >= 0.5 * sum(shares):
            return count
    return len(shares)
