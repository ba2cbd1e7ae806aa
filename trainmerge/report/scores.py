"""Scores relative to each task's expert: a radar chart, or bars for one or two tasks."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainmerge.report.picture import INK, QUIET, Picture, look, without_middle
from trainmerge.run.scores import Metric, Scores

LEARNED = "learned"
GAPS = {"perplexity": "log-perplexity", "similarity": "similarity"}  # by metric

RINGS = "The centre of the radar chart is not 0: see its rings. "


def relative_scores(scores: Scores, metric: Metric) -> dict[str, dict[str, float]]:
    """Row -> task -> score relative to the task's expert, which is 1; empty without experts' scores.

    Accuracy: score / expert's. Perplexity: the share of the gap between base and expert that is closed, in
        logs. Tasks where this is undefined are left out of all rows.
    """
    expert, base = scores.get("expert"), scores.get("base")
    if expert is None or (metric.name != "accuracy" and base is None):
        return {}

    def near(score: float, task: str) -> float:
        assert expert is not None
        if metric.name not in GAPS:
            return score / expert[task]
        assert base is not None
        if metric.name == "similarity":
            return (score - base[task]) / (expert[task] - base[task])
        return math.log(base[task] / score) / math.log(base[task] / expert[task])

    def sound(task: str) -> bool:
        return bool(expert[task]) and (metric.name != "perplexity" or base[task] != expert[task])  # type: ignore[index]

    tasks = [task for task in expert if sound(task)]
    return {row: {task: near(own[task], task) for task in tasks} for row, own in scores.items()}


def score_picture(scores: Scores, metric: Metric) -> Picture | None:
    """Scores of base, average, task arithmetic and the learned merge relative to each task's expert."""
    rows = relative_scores(scores, metric)
    tasks = list(rows.get("expert", {}))
    if not tasks:
        return None
    shown = {row: own for row, own in rows.items() if row != "expert"}
    figure = _radar(shown, tasks) if len(tasks) > 2 else _bars(shown, tasks)
    what = (
        f"the share of the {GAPS[metric.name]} gap between base and expert that is closed"
        if metric.name in GAPS
        else f"{metric.name} / the expert's {metric.name}"
    )
    means = {row: sum(own.values()) / len(own) for row, own in shown.items()}
    return Picture(
        "scores",
        "Scores",
        f"Shown is {what}, so the expert of each task is 1 (thick line). {RINGS if len(tasks) > 2 else ''}"
        "`task arithmetic` uses the best single coefficient, chosen on these test examples.",
        "Scores relative to the experts, mean over tasks: "
        + ", ".join(f"{row} {mean:.3f}" for row, mean in means.items()),
        figure,
        [f"{metric.name}, absolute", *tasks],
        [[row, *(own[task] for task in tasks)] for row, own in scores.items()],
    )


def _radar(rows: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> Figure:
    figure = Figure(figsize=(7.4, 5.4), layout="constrained")
    ax = figure.add_subplot(projection="polar")
    angles = np.linspace(0, 2 * np.pi, len(tasks), endpoint=False)
    around = [*angles, angles[0]]
    values = [value for own in rows.values() for value in own.values()]
    low = math.floor(10 * min(values) - 1) / 10
    high = max(1.0, *values) + 0.02
    ax.set_theta_offset(np.pi / 2)  # type: ignore[attr-defined]
    ax.set_theta_direction(-1)  # type: ignore[attr-defined]
    ring = np.linspace(0, 2 * np.pi, 200)
    ax.plot(ring, np.ones_like(ring), color=INK, linewidth=2.2, label="each task's expert")
    for k, (row, own) in enumerate(rows.items()):
        line = [own[task] for task in [*tasks, tasks[0]]]
        ax.plot(around, line, label=row, **_line(row, k))
        if row == LEARNED:
            ax.fill(around, line, color=_line(row, k)["color"], alpha=0.13)
    ax.set(ylim=(low, high))
    ax.set_xticks(angles, [without_middle(task, 16) for task in tasks])
    for angle, label in zip(angles, ax.get_xticklabels(), strict=True):
        side = np.sin(angle)  # labels left and right of the ring are aligned to it
        label.set_horizontalalignment("center" if abs(side) < 0.3 else "left" if side > 0 else "right")
    rings = [ring for ring in np.arange(math.ceil(10 * low) / 10, 1.001, 0.1) if ring > low]
    ax.set_yticks(rings[:: max(1, len(rings) // 5)])
    ax.set_rlabel_position(180 / len(tasks))  # type: ignore[attr-defined]
    ax.tick_params(axis="y", labelsize=7, labelcolor=INK)
    ax.grid(True)
    ax.spines["polar"].set_color(QUIET)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _bars(rows: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> Figure:
    figure = Figure(figsize=(6.8, 0.3 * len(rows) * len(tasks) + 1.0), layout="constrained")
    axes: list[Axes] = list(figure.subplots(len(tasks), 1, squeeze=False, sharex=True).flat)
    for ax, task in zip(axes, tasks, strict=True):
        values = [own[task] for own in rows.values()]
        ax.axvline(1.0, color=INK, linewidth=1.6)
        ax.barh(range(len(rows)), values, color=[_line(row, k)["color"] for k, row in enumerate(rows)])
        for place, value in enumerate(values):
            ax.annotate(
                f"{value:.3f}", (value, place), (3, 0), textcoords="offset points", va="center", size=7
            )
        ax.set_yticks(range(len(rows)), list(rows))
        ax.set(ylim=(len(rows) - 0.4, -0.6))
        ax.set_title(without_middle(task))
        ax.margins(x=0.12)
    return figure


def _line(row: str, k: int) -> dict[str, Any]:
    if row == LEARNED:
        return {**look(0), "linestyle": "-", "linewidth": 2.4, "marker": "o"}
    return {**look(k + 1), "color": ("#7a7a7a", "#d55e00", "#009e73", "#b25c91")[k % 4]}
