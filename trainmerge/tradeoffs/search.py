"""`trainmerge search`: a run folder whose coefficients maximise a score without gradients.

By CMA-ES, as in Evo-Merging (arXiv 2509.12951), whose sparsities are `densities`; or by a population with
niches, as in M2N2 (arXiv 2508.16204).

Legend: `K` experts, `G` coefficient groups.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainmerge.coefficients.constraints import Sigmoid
from trainmerge.data.calibration import Calibration
from trainmerge.fitting.fit import check_settings, fit_alone
from trainmerge.fitting.from_config import from_config
from trainmerge.fitting.module import MergeModule
from trainmerge.fitting.settle import settle
from trainmerge.preprocess import Magnitudes
from trainmerge.run.folder import RunFolder
from trainmerge.run.in_use import in_use
from trainmerge.run.merge_buffers import REESTIMATE
from trainmerge.run.saved import save_moment
from trainmerge.system.ranges import check_option
from trainmerge.tradeoffs.cma_es import Search, Tried, maximise
from trainmerge.tradeoffs.niches import Niches, evolve
from trainmerge.tradeoffs.scores import make_example_scores, make_score
from trainmerge.tradeoffs.space import FEW, Found, Over, SearchSpace


def search_config(
    config: str | Path,
    run: str | Path,
    score: str = "accuracy",
    options: Mapping[str, Any] | None = None,
    over: Over = "experts",
    search: Search | Niches = Search(),  # noqa: B008 - frozen
    initial: str | None = None,
    limit: int | None = None,
    densities: bool = False,
) -> Tried:
    """Search the coefficients with the best score; `run` becomes a run folder with them.

    Args:
        config: A configuration of `trainmerge fit`; its optimizer and steps are not used.
        run: The run folder. If it has a search, that is resumed.
        score: See `make_score`.
        options: Arguments of a score that is a class.
        over: Search one scale per expert (`experts`), or every coefficient (`coefficients`). Niches are of
            coefficients always.
        search: Settings of CMA-ES (`Search`), or of a population (`Niches`), whose score is `accuracy` or
            `loss`.
        initial: A coefficients file to start from, instead of the configuration's `model.initial`.
        limit: Use the first so many validation examples of each task; by default all.
        densities: Search one density per expert too: the share of its entries that a `Trim` after the
            recipe's methods keeps. It starts at 1, and half of a population's first genomes at 0.1.

    Raises:
        ValueError: the folder has a fit, or a search with other settings; an expert's coefficients are all
            zero; densities of quantised task vectors, or with re-estimated statistics.
    """
    check_option("limit", limit, int | None, "[1, inf)")
    folder = RunFolder(Path(run))
    with in_use(folder, "trainmerge search"):
        module, data = _begin(config, folder, initial, search.evaluations, densities)
        module.load(data)
        depends_on = {"score": score, "options": dict(options or {}), "over": over, "limit": limit or 0}
        depends_on |= {"densities": True} if densities else {}  # a header without them is as it was before
        if isinstance(search, Niches):
            points = _niches(module, data, folder, search, depends_on)
        else:
            points = _scales(module, data, folder, search, depends_on)
        best = _best(module, folder, points, search.evaluations)
        settle(folder, module, data)
        return best


def _space(module: MergeModule, over: Over, densities: bool) -> SearchSpace:
    vectors = module.resident.merged.task_vectors
    return SearchSpace(module.start, over, Magnitudes(vectors) if densities else None)


def _show(module: MergeModule, space: SearchSpace, x: Sequence[float]) -> None:
    """Make the model the merge of a point."""
    merged = module.resident.merged
    _place(module, space.coefficients(x))
    if (trim := space.trim(x)) is not None:
        merged.rule = trim[1]
    merged.materialise()


def _scales(
    module: MergeModule, data: Calibration, folder: RunFolder, search: Search, depends_on: dict[str, Any]
) -> Iterator[Found]:
    """The points of CMA-ES."""
    scoring = make_score(
        depends_on["score"], depends_on["options"], module, data, depends_on["limit"] or None
    )
    space = _space(module, depends_on["over"], "densities" in depends_on)

    def score_at(x: Sequence[float]) -> float:
        _show(module, space, x)
        return scoring()

    points = maximise(score_at, space.first(), search, folder.search, depends_on)
    return (space.found(tried) for tried in points)


def _niches(
    module: MergeModule, data: Calibration, folder: RunFolder, niches: Niches, depends_on: dict[str, Any]
) -> Iterator[Found]:
    """The genomes of a population; the first ones are the start and each expert alone."""
    scoring = make_example_scores(depends_on["score"], module, data, depends_on["limit"] or None)
    searched = "densities" in depends_on
    space = _space(module, "coefficients", searched)

    def score_at(x: Sequence[float]) -> list[float]:
        _show(module, space, x)
        return scoring()

    own = module.coefficients.constraint
    alone = [row[:, None].expand_as(module.start) for row in torch.eye(len(module.start))]
    first = [own.project(values.to(module.start)) for values in (module.start, *alone)]
    starts = [space.point(values, share) for share in (1.0, *[FEW] * searched) for values in first]
    order = network_order(module)
    order += [len(order)] * searched  # the densities' column, after all groups
    genomes = evolve(score_at, starts, order, niches, folder.search, depends_on)
    return (space.found(genome) for genome in genomes)


def network_order(module: MergeModule) -> list[int]:
    """The coefficients' groups by the first of their parameters in the network."""
    merged = module.resident.merged
    places = {id(p): place for place, p in enumerate(merged.module.parameters())}
    layout = module.coefficients.layout
    first: dict[int, tuple[int, int]] = {}
    for name, groups in layout.groups.items():
        for chunk, group in enumerate(groups):
            here = (places[id(merged.placed.owners[name])], chunk)
            first[group] = min(first.get(group, here), here)
    return sorted(range(len(layout.labels)), key=lambda group: first[group])


def _best(module: MergeModule, folder: RunFolder, points: Iterator[Found], evaluations: int) -> Tried:
    """The best point; the run's coefficients are always those of the best one so far."""
    best = Found(Tried((), -math.inf), module.start)
    count, clock = 0, time.monotonic()
    for count, found in enumerate(points, 1):
        if found.tried.score > best.tried.score:
            best = found
            _place(module, best.coefficients)
            module.coefficients.densities = best.densities
            save_moment(folder, module.coefficients, count, evaluations)
        left = (time.monotonic() - clock) / count * (evaluations - count)
        ends = f"{found.tried.score:.4f}  best {best.tried.score:.4f}  {left:.0f} s left"
        print(f"{count}/{evaluations}  score {ends}", flush=True)
    _place(module, best.coefficients)
    module.coefficients.densities = best.densities
    save_moment(folder, module.coefficients, count, steps=count)  # finished: the method may end early
    if best.densities:
        own = zip(module.recipe.experts, best.densities, strict=True)
        print("densities: " + ", ".join(f"{name} {share:.3g}" for name, share in own), flush=True)
    return best.tried


def _begin(
    config: str | Path, folder: RunFolder, initial: str | None, evaluations: int, densities: bool
) -> tuple[MergeModule, Calibration]:
    """Check the settings and create the run folder by a fit without steps."""
    if folder.latest():
        raise ValueError(
            f"{folder.path} has a fit, whose coefficients a search would replace: choose another folder"
        )
    changes: dict[str, Any] = {"trainer.max_steps": 0, "model.keep_better": False}
    settings = from_config(config, folder.path, changes | ({"model.initial": initial} if initial else {}))
    module, data = settings.module, settings.data
    if isinstance(module.coefficients.constraint, Sigmoid):
        raise ValueError("a search changes the coefficients directly: use trainmerge.Box instead of Sigmoid")
    if densities and module.settings.quantise is not None:
        raise ValueError("--densities ranks the entries of exact task vectors: leave out model.quantise")
    if densities and module.recipe.buffers == REESTIMATE:
        raise ValueError(
            "--densities: statistics are not measured of trimmed task vectors: set recipe.buffers to average"
        )
    check_settings(module, data, settings.trainer)
    fit_alone(folder, module, data, settings.trainer, config=settings.text, following=evaluations)
    return module, data


@torch.no_grad()
def _place(module: MergeModule, values: Tensor) -> None:
    """Set the coefficients to these values, or to the nearest ones in the constraint's set."""
    own = module.coefficients
    own.reset_(own.constraint.project(values.to(own.raw)))
