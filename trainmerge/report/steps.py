"""Coefficients and calibration losses over the steps."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter, NullFormatter
from torch import Tensor

from trainmerge.report.picture import COLOURS, INK, QUIET, Picture, look, panels, without_middle
from trainmerge.run.trajectory import Trajectory

SHOWN = 120  # coefficients drawn per expert
HALF_LIFE = 0.04  # of the smoothed loss, as a fraction of the steps


def path_picture(experts: Sequence[str], trajectory: Trajectory) -> Picture:
    """Each expert's coefficients over the steps: thin lines, mean thick, 10% to 90% shaded."""
    steps = trajectory.steps.numpy()
    figure, axes = panels(len(experts), 2.2 if len(experts) > 2 else 4.0, 1.75)
    for k, (ax, name) in enumerate(zip(axes, experts, strict=True)):
        values = trajectory.values[:, k]  # [S, G]
        some = torch.linspace(0, values.shape[1] - 1, min(SHOWN, values.shape[1])).long()
        ax.plot(steps, values[:, some].numpy(), color=QUIET, linewidth=0.4, alpha=0.55)
        low, high = torch.quantile(values, torch.tensor([0.1, 0.9]), dim=1).numpy()
        ax.fill_between(steps, low, high, color=COLOURS[0], alpha=0.22, linewidth=0)
        ax.plot(steps, values.mean(dim=1).numpy(), color=COLOURS[0], linewidth=2)
        ax.axhline(float(values[0].mean()), color=INK, linestyle=":", linewidth=0.9)
        ax.plot([int(steps[0])], [float(values[0].mean())], "o", color=INK, markersize=4, clip_on=False)
        ax.set_title(without_middle(name))
        ax.set_xlim(int(steps[0]), max(int(steps[-1]), 1))
        ax.grid(axis="y")
    figure.supxlabel("step", size=8.5, color=INK)
    figure.supylabel("coefficient", size=8.5, color=INK)
    S, _, G = trajectory.values.shape
    moved = (trajectory.values[-1] - trajectory.values[0]).abs().mean(dim=1).tolist()
    return Picture(
        "path",
        "Coefficients over the steps",
        f"Coefficients after each of {S} recorded steps. Thin: single "
        f"coefficients{f', {SHOWN} of {G}' if G > SHOWN else ''}; thick: their mean; shaded: their 10% to "
        "90% range; dot and dotted line: the start. If they still change at the end, use more steps.",
        "Lines of coefficients over steps. Mean distance from the start: "
        + ", ".join(f"{name} {far:.3f}" for name, far in zip(experts, moved, strict=True)),
        figure,
        ["step", "expert", "mean", "low (10%)", "high (90%)"],
        [
            [int(step), name, float(row.mean()), float(row.quantile(0.1)), float(row.quantile(0.9))]
            for step, values in zip(steps, trajectory.values, strict=True)
            for name, row in zip(experts, values, strict=True)
        ],
    )


def loss_picture(losses: Mapping[str, Tensor]) -> Picture:
    """The loss of each task on its batches, raw and smoothed."""
    names = [*(name for name in losses if name != "all"), *(name for name in losses if name == "all")]
    figure, axes = panels(len(names), 2.2 if len(names) > 2 else 4.0, 1.6, share=(True, False))
    for k, (ax, name) in enumerate(zip(axes, names, strict=True)):
        steps, values = losses[name].T
        ax.plot((steps + 1).numpy(), values.numpy(), ".", color=QUIET, markersize=2.6)
        ax.plot(
            (steps + 1).numpy(),
            smoothed(values).numpy(),
            **{**look(k), "linestyle": "-", "marker": ""},
            linewidth=1.8,
        )
        ax.set_title("all tasks" if name == "all" else without_middle(name))
        ax.grid(axis="y")
        _scale(ax, smoothed(values))
    figure.supxlabel("step", size=8.5, color=INK)
    figure.supylabel("loss", size=8.5, color=INK)
    ends = ", ".join(
        f"{name} {float(smoothed(v[:, 1])[0]):.3g} to {float(smoothed(v[:, 1])[-1]):.3g}"
        for name, v in losses.items()
    )
    return Picture(
        "loss",
        "Calibration loss",
        "The unlabeled loss of each task on each step's batch (dots) and its running mean (line). Scales "
        "differ between tasks. A rising line means that the task gets worse in favour of the others.",
        f"Lines of the loss over steps. Smoothed: {ends}.",
        figure,
        ["task", "step", "loss"],
        [[name, int(step) + 1, float(value)] for name in names for step, value in losses[name]],
    )


def smoothed(values: Tensor) -> Tensor:
    """An exponential running mean with a half-life of HALF_LIFE of the steps, without start-up bias.

    >>> smoothed(torch.ones(3)).tolist()
    [1.0, 1.0, 1.0]
    """
    keep = 0.5 ** (1 / max(1.0, HALF_LIFE * len(values)))
    total, weight, result = 0.0, 0.0, []
    for value in values.tolist():
        total, weight = keep * total + value, keep * weight + 1
        result.append(total / weight)
    return torch.tensor(result)


def _scale(ax: Axes, values: Tensor) -> None:
    """A logarithmic axis where the loss falls a hundredfold; else a linear one from about zero."""
    low, high = float(values.min()), float(values.max())
    if low > 0 and high > 100 * low:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(LogFormatter())  # the scale's own is in mathtext, which is off
        ax.yaxis.set_minor_formatter(NullFormatter())
    elif 0 <= low < 0.5 * high:
        ax.set_ylim(bottom=0)
