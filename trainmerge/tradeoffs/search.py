"""`trainmerge search`: a run folder whose coefficients maximise a score without gradients.

As in Evo-Merging (arXiv 2509.12951), without its search over sparsities.

Legend: `K` experts, `G` coefficient groups.
"""

import math
import time
from collections.abc import Mapping, Sequence
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
from trainmerge.run.folder import RunFolder
from trainmerge.run.in_use import in_use
from trainmerge.run.saved import save_moment
from trainmerge.tradeoffs.cma_es import Search, Tried, maximise
from trainmerge.tradeoffs.scales import scaled
from trainmerge.tradeoffs.scores import make_score

Over = Literal["experts", "coefficients"]


def search_config(
    config: str | Path,
    run: str | Path,
    score: str = "accuracy",
    options: Mapping[str, Any] | None = None,
    over: Over = "experts",
    search: Search = Search(),  # noqa: B008 - frozen
    initial: str | None = None,
    limit: int | None = None,
) -> Tried:
    """Search the coefficients with the best score; `run` becomes a run folder with them.

    Args:
        config: A configuration of `trainmerge fit`; its optimizer and steps are not used.
        run: The run folder. If it has a search, that is resumed.
        score: See `make_score`.
        options: Arguments of a score that is a class.
        over: Search one scale per expert (`experts`), or every coefficient (`coefficients`).
        search: Settings of the search.
        initial: A coefficients file to start from, instead of the configuration's `model.initial`.
        limit: Use the first so many validation examples of each task; by default all.

    Raises:
        ValueError: the folder has a fit, or a search with other settings; an expert's coefficients are all
            zero.
    """
    folder = RunFolder(Path(run))
    with in_use(folder, "trainmerge search"):
        module, data = _begin(config, folder, initial, search.evaluations)
        return _search(module, data, folder, score, options or {}, over, search, limit)


def _search(
    module: MergeModule,
    data: Calibration,
    folder: RunFolder,
    score: str,
    options: Mapping[str, Any],
    over: Over,
    search: Search,
    limit: int | None,
) -> Tried:
    """Score merges, from the first or from where the log ends; save the best at once."""
    module.load(data)
    scoring = make_score(score, options, module, data, limit)
    space = SearchSpace(module.start, over)

    def score_at(x: Sequence[float]) -> float:
        _place(module, space.coefficients(x))
        module.resident.merged.materialise()
        return scoring()

    depends_on = {"score": score, "options": dict(options), "over": over, "limit": limit or 0}
    points = maximise(score_at, space.first(), search, folder.search, depends_on)
    best, count, clock = Tried(space.first(), -math.inf), 0, time.monotonic()
    for count, found in enumerate(points, 1):
        if found.score > best.score:
            best = found
            _place(module, space.coefficients(best.x))
            save_moment(folder, module.coefficients, count, search.evaluations)
        left = (time.monotonic() - clock) / count * (search.evaluations - count)
        ends = f"{found.score:.4f}  best {best.score:.4f}  {left:.0f} s left"
        print(f"{count}/{search.evaluations}  score {ends}", flush=True)
    _place(module, space.coefficients(best.x))
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
