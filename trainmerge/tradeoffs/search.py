"""`trainmerge search`: a run folder whose coefficients maximise a score without gradients.

By CMA-ES, as in Evo-Merging (arXiv 2509.12951) without its search over sparsities; or by a population with
niches, as in M2N2 (arXiv 2508.16204).

Legend: `K` experts, `G` coefficient groups.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trainmerge.coefficients.constraints import Sigmoid
from trainmerge.data.calibration import Calibration
from trainmerge.fitting.fit import check_settings, fit_alone
from trainmerge.fitting.from_config import from_config
from trainmerge.fitting.module import MergeModule
from trainmerge.fitting.settle import settle
from trainmerge.run.folder import RunFolder
from trainmerge.run.in_use import in_use
from trainmerge.run.saved import save_moment
from trainmerge.tradeoffs.cma_es import Search, Tried, maximise
from trainmerge.tradeoffs.niches import Niches, evolve
from trainmerge.tradeoffs.scales import scaled
from trainmerge.tradeoffs.scores import make_example_scores, make_score

Over = Literal["experts", "coefficients"]


def search_config(
    config: str | Path,
    run: str | Path,
    score: str = "accuracy",
    options: Mapping[str, Any] | None = None,
    over: Over = "experts",
    search: Search | Niches = Search(),  # noqa: B008 - frozen
    initial: str | None = None,
    limit: int | None = None,
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

    Raises:
        ValueError: the folder has a fit, or a search with other settings; an expert's coefficients are all
            zero.
    """
    folder = RunFolder(Path(run))
    with in_use(folder, "trainmerge search"):
        module, data = _begin(config, folder, initial, search.evaluations)
        module.load(data)
        depends_on = {"score": score, "options": dict(options or {}), "over": over, "limit": limit or 0}
        if isinstance(search, Niches):
            points = _niches(module, data, folder, search, depends_on)
        else:
            points = _scales(module, data, folder, search, depends_on)
        best = _best(module, folder, points, search.evaluations)
        settle(folder, module, data)
        return best


Found = tuple[Tried, Tensor]  # a point and its coefficients [K, G]


def _scales(
    module: MergeModule, data: Calibration, folder: RunFolder, search: Search, depends_on: dict[str, Any]
) -> Iterator[Found]:
    """The points of CMA-ES."""
    scoring = make_score(
        depends_on["score"], depends_on["options"], module, data, depends_on["limit"] or None
    )
    space = SearchSpace(module.start, depends_on["over"])

    def score_at(x: Sequence[float]) -> float:
        _place(module, space.coefficients(x))
        module.resident.merged.materialise()
        return scoring()

    points = maximise(score_at, space.first(), search, folder.search, depends_on)
    return ((found, space.coefficients(found.x)) for found in points)


def _niches(
    module: MergeModule, data: Calibration, folder: RunFolder, niches: Niches, depends_on: dict[str, Any]
) -> Iterator[Found]:
    """The genomes of a population; the first ones are the start and each expert alone."""
    scoring = make_example_scores(depends_on["score"], module, data, depends_on["limit"] or None)
    space = SearchSpace(module.start, "coefficients")

    def score_at(x: Sequence[float]) -> list[float]:
        _place(module, space.coefficients(x))
        module.resident.merged.materialise()
        return scoring()

    own = module.coefficients.constraint
    alone = [row[:, None].expand_as(module.start) for row in torch.eye(len(module.start))]
    starts = [own.project(values.to(module.start)).flatten().tolist() for values in (module.start, *alone)]
    genomes = evolve(score_at, starts, network_order(module), niches, folder.search, depends_on)
    return ((found, space.coefficients(found.x)) for found in genomes)


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
    best, values = Tried((), -math.inf), module.start
    count, clock = 0, time.monotonic()
    for count, (found, coefficients) in enumerate(points, 1):
        if found.score > best.score:
            best, values = found, coefficients
            _place(module, values)
            save_moment(folder, module.coefficients, count, evaluations)
        left = (time.monotonic() - clock) / count * (evaluations - count)
        ends = f"{found.score:.4f}  best {best.score:.4f}  {left:.0f} s left"
        print(f"{count}/{evaluations}  score {ends}", flush=True)
    _place(module, values)
    save_moment(folder, module.coefficients, count, steps=count)  # finished: the method may end early
    return best


@dataclass(frozen=True)
class SearchSpace:
    """The meaning of a search point: one scale per expert, or every coefficient.

    Raises:
        ValueError: scales of coefficients that are all zero.
    """

    start: Tensor  # [K, G]
    over: Over

    def __post_init__(self) -> None:
        if self.over == "experts" and not self.start.any(dim=1).all():
            raise ValueError(
                "over: experts scales coefficients, but some expert's are all zero: set model.initial"
            )

    def first(self) -> list[float]:
        """The point of the start."""
        if self.over == "experts":
            return [1.0] * len(self.start)
        found: list[float] = self.start.flatten().tolist()
        return found

    def coefficients(self, x: Sequence[float]) -> Tensor:
        """The coefficients of a point, [K, G]."""
        values = torch.tensor(x, dtype=torch.float64)
        if self.over == "experts":
            return scaled(self.start, values)
        return values.view_as(self.start).to(self.start)


def _begin(
    config: str | Path, folder: RunFolder, initial: str | None, evaluations: int
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
    check_settings(module, data, settings.trainer)
    fit_alone(folder, module, data, settings.trainer, config=settings.text, following=evaluations)
    return module, data


@torch.no_grad()
def _place(module: MergeModule, values: Tensor) -> None:
    """Set the coefficients to these values, or to the nearest ones in the constraint's set."""
    own = module.coefficients
    own.reset_(own.constraint.project(values.to(own.raw)))
