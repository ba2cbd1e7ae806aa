"""What `trainmerge evaluate` prints and writes."""

from pathlib import Path

from trainmerge.evaluate import (
    Scores,
    evaluate_checkpoint,
    evaluate_run,
    mean,
    normalised,
    recipe_of,
    write_scores,
)
from trainmerge.run_folder import RunFolder
from trainmerge.tables import print_table, score_rows

DEFAULT_LENGTH = 256  # as in Calibration


def evaluate_path(
    path: Path, recipe: Path, limit: int, max_length: int, compare: bool, output: Path | None
) -> Scores:
    """Score a run folder with everything to compare it with, or a checkpoint on `recipe`'s tasks."""
    is_run = RunFolder(path).manifest.exists()
    if is_run:
        rows = evaluate_run(path, limit, max_length, compare=compare)
    else:
        rows = evaluate_checkpoint(path, recipe_of(recipe), limit, max_length or DEFAULT_LENGTH)
    means = {row: mean(scores) for row, scores in rows.items()}
    relative = (
        {row: normalised(scores, rows["expert"]) for row, scores in rows.items()} if "expert" in rows else {}
    )
    print_table(f"{path}", *score_rows(rows, means, relative))
    if output is not None or is_run:
        write_scores(rows, output or path / "scores.json")
    return rows
