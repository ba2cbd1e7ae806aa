"""From a finished run to a file of chunks for its second stage (Expert Merging++)."""

import json
from pathlib import Path

from trainmerge.export import open_run
from trainmerge.folders import write_whole
from trainmerge.importance import allocate, magnitude
from trainmerge.run_folder import RunFolder
from trainmerge.tables import print_table

SHOWN = 12


def allocate_run(run: str | Path, out: str | Path, budget: float, kappa: float) -> dict[str, int]:
    """Share `budget` chunks a parameter among the run's parameters by importance^kappa, and write `out`.

    The file is what `recipe.grouping.chunks` reads: {"chunks": {parameter: count}, ...}.

    Raises:
        ValueError: see `importance.allocate`; or the run has chunks already.
    """
    folder = RunFolder(Path(run))
    _, coefficients, opened = open_run(folder)
    importance = magnitude(opened.task_vectors, coefficients)
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


def _print(importance: dict[str, float], chunks: dict[str, int]) -> None:
    largest = sorted(importance, key=lambda name: -importance[name])[:SHOWN]
    cells = [[name, f"{importance[name]:.4f}", str(chunks[name])] for name in largest]
    print_table("the most important parameters", ["parameter", "importance", "chunks"], cells)
    frozen = sum(count == 0 for count in chunks.values())
    print(
        f"{sum(chunks.values())} chunks for {len(chunks)} parameters "
        f"({sum(chunks.values()) / len(chunks):.3f} a parameter); {frozen} keep their coefficient"
    )
