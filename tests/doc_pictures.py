"""Draw the pictures of the documentation: the idea, a step of a fit, and results from `tests/results`.

.venv/bin/python -m tests.doc_pictures
"""

import json
from functools import partial
from pathlib import Path
from statistics import mean

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from tests import closed_methods, closed_suite, held_out_rows, held_out_scores, results

FOLDER = Path("notebooks/docs/assets/pictures")
BLUE, ORANGE, GREEN, GREY = "#3b6fb6", "#d9822b", "#3a8f5c", "#6b7280"
SHOWN = (  # of the table of merges without learning
    "ties-mean",
    "tsv-m",
    "regmean++",
    "swudi",
    "optmerge",
    "alignment-tsv",
    "alignment-aswudi",
    "alignment-optmerge",
    "alignment-optmerge-chunks",
    "alignment-doge-am",
    "alignment-doge-am-chunks",
)


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty picture without axes, a unit an inch."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    return figure, axes


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, bend: float = 0
) -> None:
    """From point to point."""
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=14, lw=2, color=color, connectionstyle=style
        )
    )


def box(axes: Axes, x: float, y: float, text: str, color: str) -> None:
    """A labelled box of fixed size with its centre at (x, y)."""
    axes.add_patch(
        FancyBboxPatch(
            (x - 1.05, y - 0.42), 2.1, 0.84, boxstyle="round,pad=0.02", fc=f"{color}22", ec=color, lw=1.5
        )
    )
    axes.text(x, y, text, ha="center", va="center", fontsize=10, linespacing=1.4)


def idea() -> Figure:
    """Base, two experts, and the merge at c = (0.7, 0.6), as points of weight space."""
    figure, axes = canvas(7.2, 3.4)
    base, first, second = (1.4, 0.6), (4.6, 0.9), (2.2, 3.0)
    scaled = [
        tuple(b + c * (e - b) for b, e in zip(base, expert, strict=True))
        for expert, c in ((first, 0.7), (second, 0.6))
    ]
    merge = tuple(a + b - o for a, b, o in zip(*scaled, base, strict=True))
    for expert, at, color in ((first, scaled[0], BLUE), (second, scaled[1], ORANGE)):
        axes.plot(*zip(base, expert, strict=True), color=color, lw=1.2, ls=":")
        arrow(axes, base, at, color)
        axes.plot(*zip(at, merge, strict=True), color=GREY, lw=1, ls="--")
    arrow(axes, base, merge, GREEN)
    points = (
        (base, r"base $W_{\mathrm{base}}$", GREY, (-0.1, -0.3), "center"),
        (first, r"expert 1: base $+\ \tau_1$", BLUE, (0.15, -0.05), "left"),
        (second, r"expert 2: base $+\ \tau_2$", ORANGE, (0.15, 0.05), "left"),
        (merge, r"merge: base $+\ 0.7\,\tau_1 + 0.6\,\tau_2$", GREEN, (0.15, 0.0), "left"),
    )
    for at, text, color, (right, up), side in points:
        axes.plot(*at, "o", color=color, ms=8)
        axes.text(at[0] + right, at[1] + up, text, color=color, fontsize=11, ha=side, va="center")
    axes.text(2.55, 0.42, r"$0.7\,\tau_1$", color=BLUE, fontsize=10)
    axes.text(1.05, 1.5, r"$0.6\,\tau_2$", color=ORANGE, fontsize=10)
    return figure


def step() -> Figure:
    """Coefficients to weights, to losses, to weight gradients, to coefficient gradients."""
    figure, axes = canvas(9.4, 3.0)
    places = ((1.2, 2.3), (4.7, 2.3), (8.2, 2.3), (8.2, 0.7), (4.7, 0.7), (1.2, 0.7))
    texts = (
        ("coefficients\n$c_k$", GREEN),
        ("one ordinary model\n$W = W_{base} + \\sum_k c_k \\tau_k$", BLUE),
        ("loss $L$ on each\nexpert's own texts", GREY),
        ("weight gradient $G$,\none at a time", BLUE),
        ("$\\partial L/\\partial c_k = \\langle G, \\tau_k\\rangle$\n$G$ is freed", ORANGE),
        ("optimizer step", GREEN),
    )
    for (x, y), (text, color) in zip(places, texts, strict=True):
        box(axes, x, y, text, color)
    for start, end, label in (
        ((2.3, 2.3), (3.6, 2.3), "merge"),
        ((5.8, 2.3), (7.1, 2.3), "forward"),
        ((8.2, 1.85), (8.2, 1.15), "backward"),
        ((7.1, 0.7), (5.8, 0.7), "hook"),
        ((3.6, 0.7), (2.3, 0.7), ""),
        ((1.2, 1.15), (1.2, 1.85), ""),
    ):
        arrow(axes, start, end, GREY)
        beside = start[0] == end[0]
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        axes.text(
            x - (0.1 if beside else 0),
            y + (0 if beside else 0.12),
            label,
            ha="right" if beside else "center",
            fontsize=9,
            color=GREY,
            va="center" if beside else "bottom",
        )
    return figure


def gap() -> Figure:
    """Of closed forms and of learning from them: the share of the gap to the experts that is closed."""
    figure = Figure(figsize=(8.8, 4.6), layout="constrained")
    axes = figure.subplots()
    baselines = {name: suite.baselines() for name, suite in closed_suite.SUITES.items()}
    titles = [closed_methods.METHODS[name].title.replace(" tensor, ", " tensor,\n") for name in SHOWN]
    for offset, suite, title, color in (
        (0.2, "text", "eight text classifiers", BLUE),
        (-0.2, "lm", "three language models", ORANGE),
    ):
        gap_of = partial(closed_suite.SUITES[suite].gap, baselines=baselines[suite])
        shares, places = [], []
        for i, name in enumerate(SHOWN):
            if found := [gap_of(one["score"]) for one in closed_suite.measured(suite, name)]:
                shares.append(100 * sum(found) / len(found))
                places.append(len(SHOWN) - 1 - i + offset)
        bars = axes.barh(places, shares, 0.38, color=color, label=title)
        axes.bar_label(bars, fmt="%.0f%%", padding=3, fontsize=8)
    axes.set_yticks(range(len(SHOWN)), titles[::-1])
    axes.set(xlim=(0, 108), xlabel="% of the gap from task arithmetic to the experts")
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def packed() -> Figure:
    """Packed experts: bits per weight and task against the kept share of the experts' accuracy."""
    figure = Figure(figsize=(10.4, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = {"packed": "five LoRA experts (demo)", "packed_suite": "eight full fine-tunes (text suite)"}
    for axes, (group, title) in zip(panels, titles.items(), strict=True):
        _codecs(axes, group)
        axes.set_title(title, fontsize=10)
    panels[0].set_ylabel("share of the experts' accuracy (%)")
    return figure


def _codecs(axes: Axes, group: str) -> None:
    """One suite's forms."""
    found: dict[str, dict[str, float]] = {}
    for row in json.loads((results.FOLDER / "bench" / f"{group}.json").read_text())["figures"]:
        name, figure_name = row["what"].split(": ", 1)
        found.setdefault(name, {})[figure_name] = row["value"]
    colors = {"lowrank": BLUE, "ternary": GREEN, "pca": "#8a5fb0", "budget": "#111827"}
    points = sorted(
        (own["bits per weight and task"], 100 * own["of the experts' accuracy"], name)
        for name, own in found.items()
        if not name.startswith("their")
    )
    below = True
    for before, (x, y, name) in zip([points[0], *points], points, strict=False):
        crowded = x < 3 * before[0] and abs(y - before[1]) < 0.8 and name != before[2]
        below = not below if crowded else True
        family = name.replace(":", " ").split(" ")[0]
        axes.plot(x, y, "o", color=colors.get(family, ORANGE), ms=6)
        offset = (5, -11) if below else (-8, 6)
        axes.annotate(name, (x, y), offset, textcoords="offset points", fontsize=8, color=GREY)
    axes.axhline(99, color=GREY, lw=0.8, ls=":")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("bits per weight and task")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.spines[["top", "right"]].set_visible(False)


def recovered() -> Figure:
    """Of `trainmerge auto`'s merges: the share recovered without labels against the labelled score.

    What was learned is green: eight coefficients per tensor.
    """
    suites = held_out_scores.suites()
    columns = min(2, len(suites))
    rows = -(-len(suites) // columns)
    figure = Figure(figsize=(7.2 if columns == 1 else 10.4, 4.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for suite, axes in zip(suites, panels, strict=False):  # panels last: one more is left for the next loop
        together: dict[tuple[float, float], list[str]] = {}
        for point in suite.points:
            together.setdefault((point.recovered, point.score), []).append(point.row)
        order = sorted(together.items(), reverse=True)  # numbered from the highest share on
        for number, ((x, y), names) in enumerate(order, start=1):
            learned = any(name.startswith("learned") for name in names)
            axes.plot(x, y, "o", color=GREEN if learned else BLUE, ms=12)
            axes.annotate(str(number), (x, y), fontsize=8, color="white", ha="center", va="center")
        named = "\n".join(f"{number}  {', '.join(names)}" for number, (_, names) in enumerate(order, start=1))
        named = named.replace(" in 8 chunks per tensor", "").replace(", 8 chunks per tensor", "")
        axes.text(0.58, 0.03, named, transform=axes.transAxes, fontsize=8, color=GREY, va="bottom")
        axes.set_title(f"{suite.title}: Spearman {suite.correlation:.2f}", fontsize=10)
        axes.set(xlabel="recovered of the experts on held-out examples, no labels")
        axes.set_ylabel(f"{suite.metric.name} on labelled test data")
        axes.spines[["top", "right"]].set_visible(False)
        if suite.metric.sign < 0:
            axes.invert_yaxis()  # better is up
    for axes in panels:
        axes.set_axis_off()
    return figure


def shares() -> Figure:
    """Of every merge of `make suite-closed`: what unlabeled examples say against the labelled score."""
    judged = {suite: found for suite in closed_suite.SUITES if (found := held_out_rows.rows(suite))}
    figure = Figure(figsize=(5.2 * len(judged), 4.2), layout="constrained")
    for axes, (suite, found) in zip(
        figure.subplots(1, len(judged), squeeze=False).flat, judged.items(), strict=True
    ):
        for row in found:
            at = mean(row.shares[held_out_rows.JUDGE]), abs(row.score)
            axes.plot(*at, "o", color=GREEN if row.title.startswith(("alignment", "guarded")) else BLUE, ms=5)
        correlation = held_out_rows.correlation(found, held_out_rows.JUDGE)
        title = held_out_scores.TITLES[suite]
        axes.set_title(f"{title}, {len(found)} merges: Spearman {correlation:.2f}", fontsize=10)
        axes.set(xlabel="recovered of the experts on unseen examples, no labels")
        axes.set_ylabel("accuracy on labelled test data" if suite == "text" else "perplexity of test data")
        axes.spines[["top", "right"]].set_visible(False)
        if suite == "lm":
            axes.invert_yaxis()  # better is up
    return figure


SOURCES = {
    "recovered": held_out_scores.table,
    "shares": held_out_rows.table,
}  # picture -> what it shows, which the file holds as text


def main() -> None:
    """Write the pictures; the same bytes every time."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "trainmerge", "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        for draw in (idea, step, gap, packed, recovered, shares):
            name = draw.__name__
            shown = {"Description": SOURCES[name]()} if name in SOURCES else {}
            draw().savefig(FOLDER / f"{name}.svg", metadata={"Date": None, **shown})


if __name__ == "__main__":
    main()
