"""The Pareto front that `trainmerge pareto` found: what a lower loss of one task costs the others.

Legend: `T` tasks, `P` points of the front.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from trainmerge.report.picture import INK, QUIET, Picture, look, without_middle

BALANCED = "smallest increase of the worst task"
Rises = Sequence[list[float]]  # P of T


def front_picture(found: Mapping[str, Any]) -> Picture:
    """Every point's losses relative to the run's: lines over the tasks, or a scatter plot of two tasks.

    Args:
        found: The contents of RUN/pareto.json.
    """
    tasks: list[str] = found["tasks"]
    run = found["measured"][0]["predicted"]  # predicted, as the points' losses are
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
        "Trade-offs between tasks",
        "The Pareto front around the run, predicted by quadratic surrogates of the unlabeled losses (lower "
        "is better; 0% is the run). The legend names the best point for each task and the point with the "
        "smallest increase of the worst task. `trainmerge pareto RUN --export POINT --out OUT` exports a "
        "point. On held-out merges, predicted and measured losses have a rank correlation of "
        f"{min(checks):.2f} or more.",
        f"A Pareto front of {len(found['front'])} points. "
        + "; ".join(f"{what}: point {point['point']}" for what, point in chosen.items()),
        figure,
        ["point", *tasks, *(f"scale of {task}" for task in tasks)],
        [
            [entry["point"], *(entry["losses"][t] for t in tasks), *(entry["scales"][t] for t in tasks)]
            for entry in found["front"]
        ],
    )


def change(run: Mapping[str, float], losses: Mapping[str, float]) -> dict[str, float]:
    """Relative change of each loss from the run's.

    >>> change({"a": 0.5, "b": 2.0}, {"a": 0.25, "b": 3.0})
    {'a': -0.5, 'b': 0.5}
    """
    return {task: (losses[task] - of_run) / abs(of_run or 1.0) for task, of_run in run.items()}


def notable(
    tasks: Sequence[str], run: Mapping[str, float], front: Sequence[Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """Label -> point: the best point for each task, and the best for the worst task."""
    best = {f"best for {task}": min(front, key=lambda p: p["losses"][task]) for task in tasks}
    return {BALANCED: min(front, key=lambda p: max(change(run, p["losses"]).values())), **best}


def _lines(ax: Axes, tasks: Sequence[str], points: Rises, named: Mapping[str, list[float]]) -> None:
    places = range(len(tasks))
    for rises in points:
        ax.plot(places, rises, color=QUIET, linewidth=0.6, alpha=0.6)
    ax.axhline(0.0, color=INK, linewidth=2.0, label="the run")
    for k, (label, rises) in enumerate(named.items()):
        ax.plot(places, rises, label=label, **look(k))
    ax.set_xticks(places, [without_middle(task, 16) for task in tasks])
    ax.set_ylabel("change of the loss from the run's")
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.grid(True)


def _plane(ax: Axes, tasks: Sequence[str], points: Rises, named: Mapping[str, list[float]]) -> None:
    ax.plot(*zip(*sorted(points), strict=True), ".-", color=QUIET, linewidth=0.8)
    ax.plot([0.0], [0.0], "X", color=INK, markersize=9, label="the run")
    for k, (label, (across, up)) in enumerate(named.items()):
        ax.plot([across], [up], label=label, **{**look(k), "linestyle": "", "markersize": 8})
    ax.set(xlabel=f"change of the loss of {tasks[0]}", ylabel=f"change of the loss of {tasks[1]}")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    ax.grid(True)
