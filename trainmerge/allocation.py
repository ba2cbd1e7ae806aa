"""From a finished run to a file of chunks for its second stage (Expert Merging++)."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

from trainmerge.calibration import Calibration
from trainmerge.config import build
from trainmerge.examples import Columns
from trainmerge.export import open_run
from trainmerge.folders import write_whole
from trainmerge.importance import allocate, energy, magnitude
from trainmerge.module import MergeModule
from trainmerge.objectives import Objective
from trainmerge.recipe import calibration_files
from trainmerge.run_folder import RunFolder
from trainmerge.tables import print_table

By = Literal["magnitude", "energy"]
SHOWN = 12
FINE = 8  # chunks a parameter, whose gradients are measured


def allocate_run(
    run: str | Path, out: str | Path, budget: float, kappa: float, by: By = "magnitude"
) -> dict[str, int]:
    """Share `budget` chunks a parameter among the run's parameters by importance^kappa, and write `out`.

    The file is what `recipe.grouping.chunks` reads: {"chunks": {parameter: count}, ...}. `by` is the paper's
    `magnitude`, or `energy`, which runs the model over the calibration examples.

    Raises:
        ValueError: see `importance.allocate`; or the run has chunks already.
    """
    folder = RunFolder(Path(run))
    _, coefficients, opened = open_run(folder)
    importance = magnitude(opened.task_vectors, coefficients) if by == "magnitude" else energy(*_fine(folder))
    shapes = opened.task_vectors.shapes
    rows = {name: shapes[name][0] if shapes[name] else 1 for name in importance}
    chunks = allocate(importance, rows, budget, kappa)
    content = {
        "budget": budget,
        "kappa": kappa,
        "realised": sum(chunks.values()) / len(chunks),
        "chunks": chunks,
        "importance": importance,
    }
    write_whole(Path(out), json.dumps(content, indent=1))
    _print(importance, chunks)
    return chunks


def _fine(folder: RunFolder) -> tuple[MergeModule, Calibration]:
    """The run's merge and data, with several chunks a parameter."""
    recipe, _, _ = open_run(folder)
    grouping = replace(recipe.grouping, granularity="chunk", chunks=FINE)
    manifest = json.loads(folder.manifest.read_text())
    module = MergeModule(
        replace(recipe, grouping=grouping),
        build(Objective, manifest["objective"]),  # type: ignore[type-abstract]
        initial=str(folder.coefficients),
        weights=manifest["weights"],
        teacher_budget=manifest["teacher_budget"],
        workspace=str(folder.workspace),
    )
    settings = manifest["data"] | {"columns": Columns(**manifest["data"]["columns"])}
    return module, Calibration(calibration_files(recipe), **settings)


def _print(importance: dict[str, float], chunks: dict[str, int]) -> None:
    largest = sorted(importance, key=lambda name: -importance[name])[:SHOWN]
    cells = [[name, f"{importance[name]:.4f}", str(chunks[name])] for name in largest]
    print_table("the most important parameters", ["parameter", "importance", "chunks"], cells)
    frozen = sum(count == 0 for count in chunks.values())
    print(
        f"{sum(chunks.values())} chunks for {len(chunks)} parameters "
        f"({sum(chunks.values()) / len(chunks):.3f} a parameter); {frozen} keep their coefficient"
    )
