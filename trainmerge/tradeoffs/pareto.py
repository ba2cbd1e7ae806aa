"""`trainmerge pareto`: a run -> the Pareto front of its tasks' losses, and the merge of any of its points.

Coordinates are one scale per expert on the run's coefficients (1 is the run itself). So the ratios of an
expert's learned coefficients are preserved, and a front over five tasks has five coordinates.

Legend: `K` experts, `T` tasks (one per expert), `P` points.
"""

import json
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from trainmerge.coefficients.coefficients import Coefficients, load_coefficients
from trainmerge.data.calibration import Calibration
from trainmerge.export.export import export_run
from trainmerge.fitting.module import MergeModule
from trainmerge.fitting.reopen import reopen
from trainmerge.run.folder import RunFolder
from trainmerge.run.front import read_front
from trainmerge.run.in_use import in_use
from trainmerge.system.atomic import write_whole
from trainmerge.system.correlation import rank_correlation
from trainmerge.system.ranges import check_option
from trainmerge.system.safetensors_file import sha256
from trainmerge.tradeoffs.front import front, sobol_points
from trainmerge.tradeoffs.scales import losses_at, named, scaled
from trainmerge.tradeoffs.surrogate import Quadratics, check_points, fit_quadratics


def pareto_run(
    run: str | Path,
    points: int = 16,
    checks: int = 8,
    radius: float = 0.5,
    examples: int | None = 64,
    count: int = 40,
    seed: int = 0,
) -> dict[str, Any]:
    """Fit quadratics to the tasks' losses around a run, and write their front as RUN/pareto.json.

    Args:
        run: A finished run with calibration examples.
        points: Merges that the quadratics are fitted to; each takes one forward and backward per example.
        checks: Further merges to validate them on.
        radius: Scales go from 1 - radius to 1 + radius.
        examples: Calibration examples per expert; None uses all of the fit's.
        count: Approximate number of points on the front.
        seed: Seed of the points.

    Raises:
        ValueError: too few points for a quadratic, or a radius that is not positive.
    """
    check_option("radius", radius, float, "(0, inf)")
    for name, value, least in (("points", points, 1), ("checks", checks, 2), ("count", count, 1)):
        check_option(name, value, int, f"[{least}, inf)")
    check_option("examples", examples, int | None, "[1, inf)")
    check_option("seed", seed, int, "[0, inf)")
    folder = RunFolder(Path(run))
    with in_use(folder, "trainmerge pareto"):
        module, data = reopen(folder, examples=examples)
        content = _measured(module, data, points, checks, radius, count, seed)
        content["coefficients"] = sha256(folder.coefficients)
        write_whole(folder.front, json.dumps(content, indent=1))
    return content


def _measured(
    module: MergeModule, data: Calibration, points: int, checks: int, radius: float, count: int, seed: int
) -> dict[str, Any]:
    """Measure merges, and fit the quadratics to them."""
    if len(data.examples) < 2:
        raise ValueError("one expert has no trade-offs; a front needs two or more")
    check_points(points, len(data.examples))
    module.load(data)
    start = module.start
    at = sobol_design(len(start), points + checks, seed)
    found = [
        losses_at(module, data, start, 1 + radius * u) for u in track(at, description="measuring merges")
    ]
    losses, slopes = (torch.stack(part) for part in zip(*found, strict=True))
    quadratics = fit_quadratics(at[:points], losses[:points], radius * slopes[:points])
    return _content(module, quadratics, at, losses, points, radius, count)


def sobol_design(n: int, count: int, seed: int) -> Tensor:
    """The centre, then points spread over [-1, 1]^n, [count, n]."""
    return torch.cat([torch.zeros(1, n, dtype=torch.float64), sobol_points(n, count - 1, seed)])


def _content(
    module: MergeModule,
    quadratics: Quadratics,
    at: Tensor,
    losses: Tensor,
    points: int,
    radius: float,
    count: int,
) -> dict[str, Any]:
    """The contents of pareto.json."""
    names = tuple(module.recipe.experts)
    found, predicted = front(quadratics, count), quadratics(at)
    order = quadratics(found)[:, 0].argsort()
    fit = {
        name: {
            "rank_correlation": rank_correlation(predicted[points:, t], losses[points:, t]),
            "r2": _explained(predicted[points:, t], losses[points:, t]),
        }
        for t, name in enumerate(names)
    }

    def entry(u: Tensor, **more: Any) -> dict[str, Any]:
        return {"scales": named(names, 1 + radius * u), **more}

    return {
        "tasks": list(names),
        "radius": radius,
        "run": named(names, losses[0]),  # the losses of the run itself
        "checks": fit,
        "front": [entry(u, point=i, losses=named(names, quadratics(u))) for i, u in enumerate(found[order])],
        "measured": [
            entry(u, losses=named(names, losses[i]), predicted=named(names, predicted[i]), check=i >= points)
            for i, u in enumerate(at)
        ],
        "surrogate": {
            "constant": quadratics.constant.tolist(),
            "linear": quadratics.linear.tolist(),
            "curvature": quadratics.curvature.tolist(),
        },
    }


def _explained(predicted: Tensor, true: Tensor) -> float:
    """R^2: the share of the variance that is predicted."""
    return float(1 - ((predicted - true) ** 2).sum() / ((true - true.mean()) ** 2).sum())


def export_point(run: str | Path, point: int, out: str | Path, overwrite: bool = False) -> Path:
    """Write the merge of one point of RUN/pareto.json as a checkpoint folder.

    Raises:
        ValueError: no front, no such point, or the run's coefficients changed since.
    """
    folder = RunFolder(Path(run))
    file = folder.front
    if not file.is_file():
        raise ValueError(f"{file}: no front yet; `trainmerge pareto {run}` computes it")
    content = read_front(file)
    if content["coefficients"] != sha256(folder.coefficients):
        raise ValueError(f"{file} is from other coefficients than the run's current ones; compute it again")
    points = {entry["point"]: entry["scales"] for entry in content["front"]}
    if point not in points:
        raise ValueError(f"{file} has the points 0 to {max(points)}, not {point}")
    saved = load_coefficients(folder.coefficients)
    scales = torch.tensor([points[point][name] for name in saved.experts])
    values = scaled(saved().detach(), scales)
    point_of = Coefficients(saved.experts, saved.layout, values)
    return export_run(run, out, overwrite, coefficients=point_of)
