"""Of merged mixtures of experts: how many tokens reach the same experts as in each fine-tune, by layer."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from trainmerge.report.picture import Picture, look
from trainmerge.system.json_file import read_json
from trainmerge.task_vectors.parameter_names import number_of

Shares = Mapping[str, Mapping[str, float]]  # row -> router -> share of tokens, the mean over the tasks


def read_routing(evaluation: Path, rows: Collection[str]) -> Shares:
    """The shares of these rows that `trainmerge evaluate` wrote; empty for dense models."""
    content = read_json(evaluation, "Run `trainmerge evaluate` again.") if evaluation.exists() else {}
    found = {row: content[row].get("routing") for row in rows if isinstance(content.get(row), Mapping)}
    return {row: _means(tasks) for row, tasks in found.items() if isinstance(tasks, Mapping) and tasks}


def _means(tasks: Mapping[str, Any]) -> dict[str, float]:
    own = list(tasks.values())
    return {name: sum(float(task[name]) for task in own) / len(own) for name in own[0]}


def routing_picture(shares: Shares) -> Picture:
    """One line per row over the layers."""
    routers = list(next(iter(shares.values())))
    numbers = [number_of(name) for name in routers]
    places = [number[1] if number else place for place, number in enumerate(numbers)]
    figure = Figure(figsize=(6.8, 3.6), layout="constrained")
    ax = figure.add_subplot()
    for k, (row, own) in enumerate(shares.items()):
        ax.plot(places, [own[name] for name in routers], label=row, **look(k))
    ax.set(xlabel="layer", ylim=(0, 1.02))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.grid(True)
    figure.legend(loc="outside lower center", ncols=3)
    means = {row: sum(own.values()) / len(own) for row, own in shares.items()}
    return Picture(
        "routing",
        "Routing",
        "The share of tokens that a merge sends to the same set of experts as the fine-tune whose task it "
        "is, the mean over the tasks. Where it is low, the merge's routers no longer know the fine-tunes' "
        "experts: keep the base's routers, or calibrate them.",
        "Shares of equally routed tokens, mean over layers: "
        + ", ".join(f"{row} {mean:.3f}" for row, mean in means.items()),
        figure,
        ["router", *shares],
        [[name, *(own[name] for own in shares.values())] for name in routers],
    )
