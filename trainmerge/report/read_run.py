"""The data of a run's figures, read from its folder. No model runs.

Legend: `K` experts, `G` coefficient groups, `S` steps.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trainmerge.coefficients.layout import Layout
from trainmerge.report.routing import Shares, read_routing
from trainmerge.run.folder import RunFolder
from trainmerge.run.front import read_front
from trainmerge.run.open_run import of_modules, open_run, read_module_run, read_run
from trainmerge.run.recipe import Recipe
from trainmerge.run.saved import scored_with, scores_are_current, unfinished
from trainmerge.run.scores import ACCURACY, PERPLEXITY, Metric, Scores
from trainmerge.run.trajectory import Trajectory, read_trajectory
from trainmerge.system.json_file import read_json, read_json_lines
from trainmerge.system.safetensors_file import sha256
from trainmerge.task_vectors.geometry import Geometry, cached_geometry, geometry_path, load_geometry


@dataclass(frozen=True)
class Numbers:
    """The data of a run; absent parts are empty or None."""

    name: str
    recipe: Recipe | None  # None of a run of `fit_module`
    experts: tuple[str, ...]  # K
    layout: Layout
    values: Tensor  # [K, G]
    start: Tensor | None  # [K, G]
    trajectory: Trajectory | None
    losses: Mapping[str, Tensor]  # expert, or "all" -> [S, 2]: step and loss
    scores: Scores
    notes: Sequence[str]  # what the coefficients and scores are of, where that is not the end of the run
    metric: Metric
    usage: Sequence[Mapping[str, Any]]
    manifest: Mapping[str, Any]
    geometry: Geometry | None
    missing: str  # why there is no geometry
    front: Mapping[str, Any] | None  # what `trainmerge pareto` found around these coefficients
    routing: Shares  # row -> router -> share of tokens; empty for dense models

    @property
    def middle(self) -> float:
        """The middle of the colour scale: the mean starting coefficient, or without a start the mean."""
        return float((self.values if self.start is None else self.start).mean())


USAGE = ("first_step", "last_step", "wall_seconds", "cpu_seconds", "peak_bytes", "processes", "threads")
AGAIN = "Remove the file and make it again."


def read_numbers(run: str | Path) -> Numbers:
    """Read a run folder.

    The first call reads base and experts once to measure the task vectors. The result is cached in the run's
    workspace; later calls do not need the experts.

    Raises:
        ValueError: the folder holds no run, or one without coefficients.
    """
    folder = RunFolder(Path(run))
    recipe: Recipe | None = None
    if of_modules(folder):
        coefficients, manifest = read_module_run(folder)
    else:
        recipe, coefficients, manifest = read_run(folder)
    values = coefficients().detach()
    trajectory = read_trajectory(folder.trajectory, *values.shape)
    starts = trajectory is not None and int(trajectory.steps[0]) == 0
    geometry, missing = _geometry(folder, manifest)
    scores, notes = _scores(folder, coefficients.experts)
    heads = recipe is not None and any(expert.head for expert in recipe.experts.values())
    return Numbers(
        name=folder.path.resolve().name,
        recipe=recipe,
        experts=coefficients.experts,
        layout=coefficients.layout,
        values=values,
        start=trajectory.values[0] if trajectory is not None and starts else None,
        trajectory=trajectory,
        losses=read_losses(folder.metrics),
        scores=scores,
        notes=notes,
        metric=_metric(folder.path / "evaluation.json", heads),
        usage=checked_lines(folder.usage, USAGE),
        manifest=manifest,
        geometry=geometry,
        missing=missing,
        front=_front(folder),
        routing=read_routing(folder.path / "evaluation.json", scores),
    )


def checked_lines(path: Path, numbers: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a file with one per line, each with these numbers.

    Raises:
        ValueError: a line is not such an object.
    """
    lines = read_json_lines(path)
    for line in lines:
        if lacking := [name for name in numbers if not isinstance(line.get(name), int | float)]:
            raise ValueError(f"{path}: the line {line} has no number for {lacking[0]!r}. Remove the line.")
    return lines


def _metric(evaluation: Path, heads: bool) -> Metric:
    """The metric of the scores: the first measure that `trainmerge evaluate` wrote, or by the heads."""
    content = read_json(evaluation, AGAIN) if evaluation.exists() else {}
    learned = content.get("learned")
    measures = learned.get("measures") if isinstance(learned, Mapping) else None
    tasks = measures.values() if isinstance(measures, Mapping) else ()
    firsts = {next(iter(own), "") for own in tasks if isinstance(own, Mapping)}
    for name in ("accuracy", "perplexity", "exact_match", "f1", "pearson"):
        if firsts == {name}:
            return Metric(name)
    if len(firsts) > 1:
        return Metric("score")
    return ACCURACY if heads else PERPLEXITY


def _front(folder: RunFolder) -> Mapping[str, Any] | None:
    if not folder.front.exists():
        return None
    found = read_front(folder.front)
    return found if found["coefficients"] == sha256(folder.coefficients) else None


def _geometry(folder: RunFolder, manifest: Mapping[str, Any]) -> tuple[Geometry | None, str]:
    identity = json.dumps([manifest["experts"], manifest["checksums"]])
    if (path := geometry_path(folder.workspace, identity)).exists():
        return load_geometry(path), ""
    try:
        _, _, opened = open_run(folder)
    except (ValueError, FileNotFoundError) as error:  # experts are gone or changed: show the rest
        return None, str(error)
    return cached_geometry(opened.task_vectors, folder.workspace, identity), ""


def read_losses(path: Path) -> dict[str, Tensor]:
    """`all` and expert -> [S, 2], from a run's metrics."""
    rows = checked_lines(path, ("step",))
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if (key == "loss" or key.startswith("losses/")) and isinstance(value, int | float):
                found.setdefault(key.removeprefix("losses/") if key != "loss" else "all", []).append(
                    (row["step"], value)
                )
    return {name: Tensor(points) for name, points in found.items()}


def _scores(folder: RunFolder, experts: Sequence[str]) -> tuple[Scores, list[str]]:
    """Row -> task -> score, of a file that `trainmerge evaluate` wrote; and what to know about them.

    The learned merge's scores are left out if the run has other coefficients now.

    Raises:
        ValueError: a row is not a mapping of tasks to scores.
    """
    path, at = folder.path / "scores.json", unfinished(folder)
    notes = [f"The run is unfinished: the coefficients are those of {at}."] if at else []
    rows = read_json(path, AGAIN) if path.exists() else {}
    if wrong := [row for row, scores in rows.items() if not isinstance(scores, Mapping)]:
        raise ValueError(f"{path}: {wrong[0]!r} is {rows[wrong[0]]!r}, not scores per task. {AGAIN}")
    if stale := _stale(folder, rows.get("learned"), path):
        del rows["learned"]
        notes.append(stale)
    found = {
        row: {task: scores[task] for task in experts}
        for row, scores in rows.items()
        if all(isinstance(scores.get(task), float) for task in experts)
    }
    return found, notes


def _stale(folder: RunFolder, learned: Mapping[str, Any] | None, path: Path) -> str:
    """Why the learned merge's scores are not of the run's coefficients; empty if they are."""
    if learned is None or scores_are_current(folder, learned, path):
        return ""
    now = scored_with(folder)
    steps = [f"step {of['step']}" if "step" in of else "other coefficients" for of in (learned, now)]
    return f"The scores are of {steps[0]}; the run is at {steps[1]}: run `trainmerge evaluate` again."
