"""`trainmerge pareto` and `trainmerge search`; heavy imports inside, as in `commands`."""

from collections.abc import Mapping
from typing import Any, Literal

from trainmerge.system.text import listed


def pareto(
    run: str,
    export: int | None = None,
    out: str | None = None,
    overwrite: bool = False,
    points: int = 16,
    checks: int = 8,
    radius: float = 0.5,
    examples: int | Literal["all"] = 64,
    count: int = 40,
    seed: int = 0,
) -> None:
    """Show the Pareto front of the tasks around a run's merge, and export any of its points.

    The losses on unlabeled examples are fitted by quadratics in one scale per expert. RUN/pareto.json has
    their front, the measured merges, and the rank correlation on held-out merges.

    Examples: trainmerge pareto runs/first
              trainmerge pareto runs/first --export 3 --out merged/

    Args:
        run: A finished run.
        export: Only export the merge of this point of an existing front, as the folder `out`.
        out: The folder to create.
        overwrite: Replace the folder if it exists.
        points: Merges to fit the quadratics to.
        checks: Further merges to validate them on.
        radius: Experts' coefficients are scaled by 1 - radius to 1 + radius.
        examples: Calibration examples per expert; `all` is as many as the fit used.
        count: Approximate number of points on the front.
        seed: Seed of the points.
    """
    if export is not None or out is not None:
        write_point(run, export, out, overwrite)
    else:
        used = None if examples in (0, "all") else int(examples)
        print_front(run, points, checks, radius, used, count, seed)


def write_point(run: str, export: int | None, out: str | None, overwrite: bool) -> None:
    """Export the merge of a point of an existing front."""
    from trainmerge.tradeoffs import export_point

    if export is None or out is None:
        raise ValueError("to export a point, give both: --export POINT --out FOLDER")
    print(f"merged checkpoint: {export_point(run, export, out, overwrite)}")


def search(
    configuration: str,
    run: str,
    score: str = "accuracy",
    score_args: dict[str, Any] | None = None,
    over: Literal["experts", "coefficients"] | None = None,
    method: Literal["cma-es", "niches"] = "cma-es",
    evaluations: int = 100,
    spread: float | None = None,
    population: int | None = None,
    seed: int = 0,
    initial: str | None = None,
    limit: int | None = None,
    alpha: float | None = None,
    densities: bool = False,
) -> None:
    """Search coefficients by any score, without gradients; the same command resumes.

    Examples: trainmerge search configs/demo.yaml runs/found --score loss --evaluations 50
              trainmerge search configs/demo.yaml runs/found --score my.Judge --score-args '{"n": 5}'
              trainmerge export runs/found merged/

    Args:
        configuration: A configuration of `trainmerge fit`: recipe, start, constraint, data.
        run: The run folder to create or resume.
        score: accuracy, macro_f1, calibration_error, perplexity or bits_per_byte of the experts' `validation`
            files; loss, the objective on unlabeled examples; or a callable's import path: model -> float.
        score_args: Arguments of a score that is a class.
        over: Search one scale per expert (by default), or every coefficient, as niches always do.
        method: cma-es; or niches, a population that shares examples (score: accuracy or loss).
        evaluations: Merges to score.
        spread: Initial standard deviation of cma-es, 0.2 by default.
        population: Merges per generation, or in the archive (20); by default left to the method.
        seed: Seed of the draws.
        initial: A coefficients file to start from.
        limit: Use the first so many validation examples of each task; by default all.
        alpha: Competition for examples of niches, 1 by default; 0 is a plain genetic algorithm.
        densities: Search one density per expert too: the share of its entries that is kept, the largest.
    """
    _refuse_others(method, {"alpha": alpha}, {"over": over, "spread": spread, "score-args": score_args})
    from trainmerge.tradeoffs import search_config
    from trainmerge.tradeoffs.cma_es import Search
    from trainmerge.tradeoffs.niches import Niches

    how: Search | Niches = Search(evaluations, 0.2 if spread is None else spread, population or None, seed)
    if method == "niches":
        how = Niches(evaluations, population or 20, 1.0 if alpha is None else alpha, seed)
    where = over or "experts"
    own = initial or None, limit or None, densities
    best = search_config(configuration, run, score, score_args, where, how, *own)
    print(f"best score: {best.score:.4f}\nnext: trainmerge export {run} OUT")


def _refuse_others(method: str, of_niches: Mapping[str, Any], of_cma_es: Mapping[str, Any]) -> None:
    """Raise ValueError for options of the other method."""
    others, owner = (of_cma_es, "cma-es") if method == "niches" else (of_niches, "niches")
    if wrong := [f"--{name}" for name, value in others.items() if value is not None]:
        raise ValueError(f"{listed(wrong)}: only of --method {owner}; leave it out")


def print_front(run: str, *settings: Any) -> None:
    """Compute the front, and print its points and its validation."""
    from trainmerge.system.console import print_table
    from trainmerge.tradeoffs.pareto import pareto_run

    content = pareto_run(run, *settings)
    tasks = content["tasks"]
    rows = [["run", *(f"{content['run'][task]:.4f}" for task in tasks), *["1.00"] * len(tasks)]]
    rows += [
        [
            str(entry["point"]),
            *(f"{entry['losses'][task]:.4f}" for task in tasks),
            *(f"{entry['scales'][task]:.2f}" for task in tasks),
        ]
        for entry in content["front"]
    ]
    scales = [f"x {task}" for task in tasks]
    print_table("losses on the front, and the experts' scales", ["point", *tasks, *scales], rows)
    checks = content["checks"]
    fit = [[task, *(f"{checks[task][name]:.3f}" for name in ("rank_correlation", "r2"))] for task in tasks]
    print_table("held-out merges: predicted against measured", ["task", "rank correlation", "R2"], fit)
    print(f"next: trainmerge report {run}   shows the front")
    print(f"      trainmerge pareto {run} --export POINT --out OUT")
