"""`trainmerge evaluate` and `trainmerge compare`: score, print and write."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from trainmerge.evaluate import Comparison, Evaluation, compare, evaluate_checkpoint, evaluate_run
from trainmerge.evaluate.kept import scores_beside
from trainmerge.evaluate.tables import print_comparison, print_evaluation
from trainmerge.model.resident import DEVICE
from trainmerge.run.folder import RunFolder
from trainmerge.run.saved import scored_with, unfinished_line
from trainmerge.run.sources import columns_of, tasks_of, text_length
from trainmerge.system.access import can_write, check_file_place
from trainmerge.system.distributed import joined, rank


def evaluate_path(
    path: Path,
    recipe: Path,
    limit: int | None = None,
    max_length: int | None = None,
    compare: bool = True,
    output: Path | None = None,
    answers: int | None = None,
    harness: Sequence[str] = (),
    precision: str = "32",
    controls: bool = False,
    fresh: bool = False,
) -> Evaluation:
    """Score a run folder with baselines, or a checkpoint on the tasks of `recipe`.

    Raises:
        ValueError: `output` cannot be written, or, without it, the run folder; `precision` is neither `32`
            nor `bf16`; a run folder and another's `recipe`; `controls` of a checkpoint, which has no task
            vectors; or as `evaluate_run` and `evaluate_checkpoint`.
    """
    if output is not None:
        check_file_place(output)
    folder, forwards = RunFolder(path), _forwards(precision)
    is_run = folder.manifest.exists()
    if is_run and recipe.resolve() != path.resolve():
        raise ValueError(
            f"{path} is a run folder, which is scored on the tasks of its own recipe: leave out --recipe, or "
            f"name a checkpoint, as trainmerge export {path} OUT writes it"
        )
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
            found = evaluate_run(path, limit, max_length, **options, controls=controls, reuse=not fresh)
        else:
            length = text_length(recipe, max_length)
            columns = columns_of(recipe)
            options = {"columns": columns, "kept": None if fresh else scores_beside(recipe)}
            found = evaluate_checkpoint(
                str(path), tasks_of(recipe), limit, length, answers, harness, **options
            )
        if rank() == 0:
            print_evaluation(f"{path}{', forwards in bfloat16' * (precision == 'bf16')}", found)
            _print_taken(found)
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
    fresh: bool = False,
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
        found = compare(paths, recipe, limit, max_length, reuse=not fresh)
        if rank() == 0:
            print_comparison(found)
            _print_taken(found.evaluation)
            if output is not None:
                found.write(output)
    return found


def _print_taken(found: Evaluation) -> None:
    """Which rows no model was run for."""
    if taken := found.taken:
        rows = f"{len(taken)} of {len(found.rows)} rows"
        print(f"{rows} are from earlier evaluations ({', '.join(taken)}): --fresh scores them again")


def _print_unfinished(folder: RunFolder) -> None:
    if folder.coefficients.exists() and rank() == 0 and (line := unfinished_line(folder)):
        print(line, flush=True)
