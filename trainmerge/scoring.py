"""What `trainmerge evaluate` prints and writes."""

from pathlib import Path

from trainmerge.evaluate import (
    DEFAULT_LENGTH,
    evaluate_checkpoint,
    evaluate_run,
    metric_of,
    recipe_of,
    write_scores,
)
from trainmerge.metrics import Scores
from trainmerge.run_folder import RunFolder
from trainmerge.tables import print_table, score_rows


def evaluate_path(
    path: Path, recipe: Path, limit: int, max_length: int, compare: bool, output: Path | None
) -> Scores:
    """Score a run folder with everything to compare it with, or a checkpoint on `recipe`'s tasks."""
    is_run = RunFolder(path).manifest.exists()
    tasks = recipe_of(path if is_run else recipe)
    metric = metric_of(tasks)
    if is_run:
        rows = evaluate_run(path, limit, max_length, compare=compare)
    else:
        rows = evaluate_checkpoint(path, tasks, limit, max_length or DEFAULT_LENGTH)
    means = {row: metric.mean(scores) for row, scores in rows.items()}
    print_table(f"{path}", *score_rows(metric.name, rows, means, metric.normalised(rows)))
    if output is not None or is_run:
        write_scores(rows, metric, output or path / "scores.json")
    return rows
