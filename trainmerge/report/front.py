"""The front that `trainmerge pareto` found: what a better loss of one task costs the others.

Legend: `T` tasks, `P` points of the front.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from trainmerge.report.picture import INK, QUIET, Picture, look, shortened

BALANCED = "least rise of the worst task"
Rises = Sequence[list[float]]  # P of T


def front_picture(found: Mapping[str, Any]) -> Picture:
    """Every point's losses beside the run's: a line over the tasks, or of two tasks a place in the plane.

    Args:
        found: What RUN/pareto.json holds.
    """
    tasks: list[str] = found["tasks"]
    run = found["measured"][0]["predicted"]  # like with like: the points' losses are predicted too
    chosen = notable(tasks, run, found["front"])
    figure = Figure(figsize=(max(5.6, 1.3 * len(tasks) + 2.2), 4.4), layout="constrained")
    ax = figure.add_subplot()
    points = [list(change(run, point["losses"]).values()) for point in found["front"]]
    named = {f"point {p['point']}: {what}": points[found["front"].index(p)] for what, p in chosen.items()}
    (_plane if len(tasks) == 2 else _lines)(ax, tasks, points, named)
    figure.legend(loc="outside lower center", ncols=2 if len(tasks) > 2 else 1)
    checks = [found["checks"][task]["rank_correlation"] for task in tasks]
    return Picture(
        "front",
        "What one task costs another",
        "Merges around the run of which none is better than another in every task, as surrogates of the "
        "unlabeled losses have them (less is better; 0% is the run). Named are those that are best for one "
        "task, and the one whose worst task rises least: `trainmerge pareto RUN --export POINT --out OUT` "
        f"writes a point's model. Unseen merges were ranked with a correlation of {min(checks):.2f} or more.",
        f"A front of {len(found['front'])} points. "
        + "; ".join(f"{what}: point {point['point']}" for what, point in chosen.items()),
        figure,
        ["point", *tasks, *(f"scale of {task}" for task in tasks)],
        [
            [entry["point"], *(entry["losses"][t] for t in tasks), *(entry["scales"][t] for t in tasks)]
            for entry in found["front"]
        ],
    )


def change(run: Mapping[str, float], losses: Mapping[str, float]) -> dict[str, float]:
    """How much more than the run's each loss is, as a share of it.

    >>> change({"a": 0.5, "b": 2.0}, {"a": 0.25, "b": 3.0})
    {'a': -0.5, 'b': 0.5}
    """
    return {task: (losses[task] - of_run) / abs(of_run or 1.0) for task, of_run in run.items()}


def notable(
    tasks: Sequence[str], run: Mapping[str, float], front: Sequence[Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """What a point is known for -> that point: the best for each task, and for the worst task."""
    best = {f"least of {task}": min(front, key=lambda p: p["losses"][task]) for task in tasks}
    return {BALANCED: min(front, key=lambda p: max(change(run, p["losses"]).values())), **best}


def _lines(ax: Axes, tasks: Sequence[str], points: Rises, named: Mapping[str, list[float]]) -> None:
    places = range(len(tasks))
    for rises in points:
        ax.plot(places, rises, color=QUIET, linewidth=0.6, alpha=0.6)
    ax.axhline(0.0, color=INK, linewidth=2.0, label="the run")
    for k, (label, rises) in enumerate(named.items()):
        ax.plot(places, rises, label=label, **look(k))
    ax.set_xticks(places, [shortened(task, 16) for task in tasks])
    ax.set_ylabel("loss, more than the run's")
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.grid(True)


def _plane(ax: Axes, tasks: Sequence[str], points: Rises, named: Mapping[str, list[float]]) -> None:
    ax.plot(*zip(*sorted(points), strict=True), ".-", color=QUIET, linewidth=0.8)
    ax.plot([0.0], [0.0], "X", color=INK, markersize=9, label="the run")
    for k, (label, (across, up)) in enumerate(named.items()):
        ax.plot([across], [up], label=label, **{**look(k), "linestyle": "", "markersize": 8})
    ax.set(xlabel=f"loss of {tasks[0]}, more than the run's", ylabel=f"loss of {tasks[1]}")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    ax.grid(True)
