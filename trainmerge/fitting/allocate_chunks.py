"""Allocate chunks from a finished run for its second stage (Expert Merging++)."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

from rich.progress import track

from trainmerge.coefficients.chunk_allocation import allocate_chunks, magnitude, shares
from trainmerge.data.calibration import Calibration
from trainmerge.fitting.calibration_loss import batches, loss_and_gradient
from trainmerge.fitting.module import MergeModule
from trainmerge.fitting.reopen import reopen
from trainmerge.run.folder import RunFolder
from trainmerge.run.open_run import open_run
from trainmerge.system.access import check_file_place
from trainmerge.system.atomic import write_whole
from trainmerge.system.console import print_table

By = Literal["magnitude", "energy"]
SHOWN = 12
FINE = 8  # chunks per parameter, whose gradients are measured


def allocate_run(
    run: str | Path, out: str | Path, budget: float, kappa: float, by: By = "magnitude"
) -> dict[str, int]:
    """Share `budget` chunks per parameter among the run's parameters by importance^kappa, and write `out`.

    The file is what `recipe.grouping.chunks` reads: {"chunks": {parameter: count}, ...}. `by` is the paper's
    `magnitude`, or `energy`, which runs the model over the calibration examples.

    Raises:
        ValueError: see `chunk_allocation.allocate`; or the run already has chunks.
    """
    check_file_place(out)
    folder = RunFolder(Path(run))
    _, coefficients, opened = open_run(folder)
    importance = magnitude(opened.task_vectors, coefficients) if by == "magnitude" else energy(*_fine(folder))
    shapes = opened.task_vectors.shapes
    rows = {name: shapes[name][0] if shapes[name] else 1 for name in importance}
    chunks = allocate_chunks(importance, rows, budget, kappa)
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
    """The run's merge and data, with several chunks per parameter."""
    recipe, _, _ = open_run(folder)
    return reopen(folder, replace(recipe.grouping, granularity="chunk", chunks=FINE))


def _print(importance: dict[str, float], chunks: dict[str, int]) -> None:
    largest = sorted(importance, key=lambda name: -importance[name])[:SHOWN]
    cells = [[name, f"{importance[name]:.4f}", str(chunks[name])] for name in largest]
    print_table("the most important parameters", ["parameter", "importance", "chunks"], cells)
    frozen = sum(count == 0 for count in chunks.values())
    print(
        f"{sum(chunks.values())} chunks for {len(chunks)} parameters "
        f"({sum(chunks.values()) / len(chunks):.3f} per parameter); {frozen} with a fixed coefficient"
    )


def energy(module: MergeModule, data: Calibration) -> dict[str, float]:
    """Sum of squared coefficient gradients of every batch and chunk, normalised to sum to one.

    Measures how much the calibration losses depend on each chunk's own coefficient, which `magnitude` only
    estimates. One forward and backward pass over all calibration examples at the current coefficients;
    `module` needs a layout with several chunks per parameter.
    """
    module.load(data)
    module.resident.merged.materialise()
    scores = dict.fromkeys(module.opened.layout.groups, 0.0)
    for batch in track(list(batches(module.resident, data)), description="measuring gradients"):
        squares = loss_and_gradient(module, batch)[1].double().square().sum(dim=0)
        for name, groups in module.opened.layout.groups.items():
            scores[name] += squares[list(groups)].sum().item()
    return shares(scores)
