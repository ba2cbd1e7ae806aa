"""The tables that `trainmerge evaluate` and `trainmerge compare` print."""

from collections.abc import Mapping

from trainmerge.evaluate.comparison import Comparison
from trainmerge.evaluate.controls import behind_learned
from trainmerge.evaluate.evaluation import Evaluation
from trainmerge.run.scores import score_rows
from trainmerge.system.console import print_table


def print_evaluation(title: str, found: Evaluation) -> None:
    """Scores per task; all measures, if there are more than the score; the harness's results."""
    header, cells = score_rows(found.metric.name, found.scores, found.means(), found.normalised())
    _add_held_out(found, header, cells)
    print_table(title, header, cells)
    _print_measures(found)
    _print_routing(found)
    _print_controls(found)
    for row, scores in found.harness.items():
        print_table(
            f"harness, {row}",
            ["task", "metric", "value"],
            [[task, name, f"{v:.4f}"] for task, s in scores.items() for name, v in s.metrics.items()],
        )


def _print_controls(found: Evaluation) -> None:
    """How far each control is behind the learned merge."""
    rows = [
        [
            row,
            f"{gap.worse_by:.3f}",
            f"{gap.low:.3f} to {gap.high:.3f}",
            "not significant" if gap.noise else "",
        ]
        for row, gap in behind_learned(found).items()
    ]
    if rows:
        unit = "nats per token" if found.metric.sign < 0 else found.metric.name
        header = ["control", f"behind the learned merge, {unit}", "95% interval, paired bootstrap", ""]
        print_table("controls", header, rows)


def _print_measures(found: Evaluation) -> None:
    measures = found.measures()
    names = list(dict.fromkeys(name for row in measures.values() for name in row))
    rows = [
        [row, *(f"{own[name]:.3f}" if name in own else "" for name in names)] for row, own in measures.items()
    ]
    print_table(
        "means over the experts' tasks", ["measure", *(name.replace("_", " ") for name in names)], rows
    )


def _print_routing(found: Evaluation) -> None:
    """Of mixtures: by layer, how many tokens go where the fine-tunes' own routers send them."""
    if not (layers := found.layers()):
        return
    rows = list(next(iter(layers.values())))
    cells = [[name, *(f"{own[row]:.3f}" for row in rows)] for name, own in layers.items()]
    means = [sum(own[row] for own in layers.values()) / len(layers) for row in rows]
    print_table(
        "share of tokens with the same set of experts as in the task's fine-tune, mean over the tasks",
        ["router", *rows],
        [*cells, ["mean", *(f"{mean:.3f}" for mean in means)]],
    )


def _add_held_out(found: Evaluation, header: list[str], cells: list[list[str]]) -> None:
    """Columns for the held-out tasks and for forgetting."""
    others, forgetting = found.others, found.forgetting()
    if not others:
        return
    header += [f"{task} (held out)" for task in found.held_out] + ["forgetting"]
    for row, scores in zip(found.scores, cells, strict=True):
        scores += [_number(others.get(row, {}), task) for task in found.held_out]
        scores += [_number(forgetting, row)]


def _number(numbers: Mapping[str, float], key: str) -> str:
    return f"{numbers[key]:.3f}" if key in numbers else ""


def print_comparison(found: Comparison) -> None:
    """One row per model, the best of each column marked, and each row's difference from the best mean."""
    evaluation = found.evaluation
    means, sign = evaluation.means(), evaluation.metric.sign
    header = [evaluation.metric.name, *evaluation.held_in, "mean", "worse by", "95% interval", ""]
    columns = {task: {row: s[task] for row, s in evaluation.scores.items()} for task in evaluation.held_in}
    columns["mean"] = means
    best = {name: max(sign * value for value in column.values()) for name, column in columns.items()}
    cells = []
    for row, gap in found.differences.items():
        marked = [
            f"{column[row]:.3f}{'*' if sign * column[row] == best[name] else ' '}"
            for name, column in columns.items()
        ]
        apart = "best" if row == found.best else "not significant" if gap.noise else "worse"
        cells.append([row, *marked, f"{gap.worse_by:.3f}", f"{gap.low:.3f} to {gap.high:.3f}", apart])
    _add_held_out(evaluation, header, cells)
    print_table(
        "* best per column; differences in the mean, paired bootstrap over the test examples", header, cells
    )
    if sign < 0:
        print("differences are in log-perplexity, nats per token")
