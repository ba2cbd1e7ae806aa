"""The printed and written output of `trainmerge evaluate` and `trainmerge compare`."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from trainmerge.evaluate import Comparison, Evaluation, compare, evaluate_checkpoint, evaluate_run
from trainmerge.evaluate.controls import behind_learned
from trainmerge.model.resident import DEVICE
from trainmerge.run.folder import RunFolder
from trainmerge.run.saved import scored_with, unfinished_line
from trainmerge.run.scores import score_rows
from trainmerge.run.sources import columns_of, tasks_of, text_length
from trainmerge.system.access import can_write, check_file_place
from trainmerge.system.console import print_table
from trainmerge.system.distributed import joined, rank


def evaluate_path(
    path: Path,
    recipe: Path,
    limit: int | None = None,
    max_length: int | None = None,
    compare: bool = True,
    output: Path | None = None,
    answers: int = 0,
    harness: Sequence[str] = (),
    precision: str = "32",
    controls: bool = False,
) -> Evaluation:
    """Score a run folder with baselines, or a checkpoint on the tasks of `recipe`.

    Raises:
        ValueError: `output` cannot be written, or, without it, the run folder; `precision` is neither `32`
            nor `bf16`; `controls` of a checkpoint, which has no task vectors; or as `evaluate_run` and
            `evaluate_checkpoint`.
    """
    if output is not None:
        check_file_place(output)
    folder, forwards = RunFolder(path), _forwards(precision)
    is_run = folder.manifest.exists()
    if controls and not is_run:
        raise ValueError(f"{path} is no run folder, and controls need its task vectors: name the run")
    keep = is_run and can_write(path)
    if is_run and not keep and output is None:
        raise ValueError(f"{path}: no permission to write its scores.json: write to another file (--output)")
    with joined(), forwards:
        if is_run:
            _print_unfinished(folder)
            scored = scored_with(folder) if folder.coefficients.exists() else {}
            options: dict[str, Any] = {"compare": compare, "answers": answers, "harness": harness}
            found = evaluate_run(path, limit, max_length, **options, controls=controls)
        else:
            length = text_length(recipe, max_length)
            columns = columns_of(recipe)
            found = evaluate_checkpoint(str(path), tasks_of(recipe), limit, length, answers, harness, columns)
        if rank() == 0:
            print_evaluation(f"{path}{', forwards in bfloat16' * (precision == 'bf16')}", found)
            if keep:
                found.write_scores(path / "scores.json", {**scored, "precision": precision})
                found.write(path / "evaluation.json")
            if output is not None:
                found.write(output)
    return found


def _forwards(precision: str) -> AbstractContextManager[Any]:
    """The autocast of the models' forwards; merges and experts are made in float32 within it too."""
    if precision not in ("32", "bf16"):
        raise ValueError(f"--precision {precision}: choose 32 (the model's own) or bf16 (bfloat16 products)")
    return torch.autocast(DEVICE, torch.bfloat16) if precision == "bf16" else nullcontext()


def compare_paths(
    paths: Sequence[str],
    recipe: str | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    output: Path | None = None,
) -> Comparison:
    """Score several runs and checkpoints, and print one table.

    Raises:
        ValueError: `output` cannot be written; or as `compare`.
    """
    if output is not None:
        check_file_place(output)
    with joined():
        for folder in map(RunFolder, map(Path, paths)):
            if folder.manifest.exists():
                _print_unfinished(folder)
        found = compare(paths, recipe, limit, max_length)
        if rank() == 0:
            print_comparison(found)
            if output is not None:
                found.write(output)
    return found


def _print_unfinished(folder: RunFolder) -> None:
    if folder.coefficients.exists() and rank() == 0 and (line := unfinished_line(folder)):
        print(line, flush=True)


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
