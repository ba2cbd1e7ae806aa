"""The commands on runs and checkpoints; heavy imports happen inside them, so `--help` is quick."""

from pathlib import Path
from typing import Literal


def allocate(
    run: str,
    out: str,
    budget: float = 1.0,
    kappa: float = 1.0,
    by: Literal["magnitude", "energy"] = "magnitude",
) -> None:
    """Allocate chunks to a run's parameters by importance, for a second fit (Expert Merging++).

    Example: trainmerge allocate runs/first chunks.json --budget 1.2 --kappa 1
             trainmerge fit CONFIG runs/second --recipe.grouping.granularity chunk
                 --recipe.grouping.chunks chunks.json --model.initial runs/first/coefficients.safetensors

    Args:
        run: A finished run with one coefficient per parameter.
        out: The JSON file to write.
        budget: Mean chunks per parameter; parameters without chunks keep their coefficient.
        kappa: 0 allocates evenly, 1 in proportion to importance, more concentrates.
        by: Importance: `magnitude` of the merge's change, or measured gradient `energy`.
    """
    from trainmerge.fitting.allocate_chunks import allocate_run

    allocate_run(run, out, budget, kappa, by)


def evaluate(
    path: str,
    recipe: str | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    compare: bool = True,
    output: str | None = None,
    answers: int | None = None,
    harness: list[str] | None = None,
    precision: str = "32",
    controls: bool = False,
    fresh: bool = False,
) -> None:
    """Score a run (compared with base, average, task arithmetic and experts) or a checkpoint.

    Examples: trainmerge evaluate runs/first
              trainmerge evaluate merged/ --recipe runs/first
              torchrun --nproc-per-node 2 -m trainmerge.cli evaluate runs/first
              trainmerge evaluate runs/first --harness "[arc_easy, my_task.yaml]"

    Args:
        path: A run folder, or a checkpoint folder.
        recipe: The tasks of a checkpoint: a run folder or a configuration.
        limit: Score the first so many examples of each task only; all by default.
        max_length: Texts are cut at this many tokens; by default as in the recipe's fit, or at 256.
        compare: Score base, average, task arithmetic and experts too; with --no-compare, the merge only.
        output: Write the scores, with all measures, to this JSON file too.
        answers: Answer the test files' column `prompt` with up to this many tokens, and report answer
            lengths.
        harness: Tasks of lm-evaluation-harness: their names, or YAML files of one task each.
        precision: 32, or bf16: forwards in bfloat16, faster on processors that have its products.
        controls: Score a run's merge with random task vectors, shuffled coefficients, and a fresh LoRA.
        fresh: Score every row again; by default scores of the same weights and texts are taken from earlier.
    """
    from trainmerge.evaluate.console import evaluate_path

    length, file = max_length or None, Path(output) if output else None
    tasks = harness or ()
    source = Path(recipe or path)
    options = answers, tasks, precision, controls, fresh
    evaluate_path(Path(path), source, limit or None, length, compare, file, *options)


def compare(
    paths: list[str],
    recipe: str | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    output: str | None = None,
    fresh: bool = False,
) -> None:
    """Score several runs and checkpoints on the same tasks: one table, the best marked.

    Each difference from the best comes with its 95% interval, from a paired bootstrap over the test examples.

    Example: trainmerge compare runs/first runs/second merged/ --recipe runs/first

    Args:
        paths: Run folders and checkpoint folders.
        recipe: The tasks: a run folder or a configuration; by default the first path.
        limit: Score the first so many examples of each task only; all by default.
        max_length: Texts are cut at this many tokens; by default as in the recipe's fit, or at 256.
        output: Write the scores to this JSON file too.
        fresh: Score every row again; by default scores of the same weights and texts are taken from earlier.
    """
    from trainmerge.evaluate.console import compare_paths

    compare_paths(paths, recipe, limit or None, max_length or None, Path(output) if output else None, fresh)


def report(run: str, out: str | None = None) -> None:
    """Write a run's report: one page with coefficients, losses, task vectors, scores; PNG and CSV per figure.

    Example: trainmerge report runs/first

    Args:
        run: The run folder.
        out: The folder to write; by default `report` in the run folder.
    """
    from trainmerge.report import write_report
    from trainmerge.run.folder import RunFolder
    from trainmerge.run.saved import unfinished_line

    page = write_report(run, out or None)
    if line := unfinished_line(RunFolder(Path(run))):
        print(line)
    print(f"report: {page}")
