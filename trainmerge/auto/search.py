"""The search of `auto`: which starts, at which scales, and what is learned from them.

Legend: `K` experts, `G` coefficient groups.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from torch import Tensor

from trainmerge.auto.choice import Choice, warn_if_none
from trainmerge.auto.judging import Judged
from trainmerge.auto.scales import common_scale, own_scales
from trainmerge.auto.starts import starts
from trainmerge.auto.trials import Examples, Trial, TrialLog
from trainmerge.coefficients.coefficients import Coefficients, save_coefficients
from trainmerge.coefficients.constraints import Sigmoid
from trainmerge.data.held_out import with_held_out
from trainmerge.fitting.fit import fit
from trainmerge.fitting.from_config import FitSettings, from_config
from trainmerge.fitting.generated import share_generated
from trainmerge.fitting.held_out_stopping import StopOnHeldOut
from trainmerge.run.config import read_settings, to_config
from trainmerge.run.recipe import Recipe
from trainmerge.system.text import shortened
from trainmerge.system.workspace import digest

FINALISTS = 2  # starts that get a scale per expert, and are learned from
STEPS = 80  # of a configuration that has none
CHUNKS = 8  # coefficients per tensor that are learned where the granularity is `tensor`


class AutoSearch:
    """One search in the folder `place`."""

    def __init__(
        self, config: Path, place: Path, held_out: float, minutes: float | None, memory: str | None
    ) -> None:
        self.config, self.place, self.memory = config, place, memory
        self.problems: list[str] = []  # why starts were left out
        given = read_settings(config)
        self.trainer: Mapping[str, Any] = given.get("trainer") or {}
        self.changes: dict[str, Any] = {"data.held_out": held_out}
        limit = (given.get("data") or {}).get("max_examples")
        if limit:  # so many to learn from; others judge
            self.changes["data.max_examples"] = with_held_out(limit, held_out)
        if not self.trainer.get("max_steps"):
            self.changes["trainer.max_steps"] = STEPS
        self.ends = monotonic() + 60 * minutes if minutes else None
        self.settings = self._settings("judging", {})
        module = self.settings.module
        if isinstance(module.coefficients.constraint, Sigmoid):
            raise ValueError("auto scales coefficients directly: use trainmerge.Box instead of Sigmoid")
        inputs, self.K = module.inputs(self.settings.data), len(module.recipe.experts)
        log, base = TrialLog(place / "trials.jsonl"), dict[Examples, Tensor]()
        tried = starts(self.K, module.recipe.preprocess, module.initial)
        self.judged = {start.name: Judged(start, inputs, module.objective, log, base) for start in tried}

    def choose(self, learn: bool = True) -> Choice:
        """Try everything, and make the run folder of the best; without `learn`, starts at scales alone."""
        found = {name: self._try(name, judge) for name, judge in self.judged.items()}
        rows = {name: trial for name, trial in found.items() if trial is not None}
        if not rows:
            reasons = "; ".join(dict.fromkeys(self.problems)) or "give more minutes"
            raise ValueError(f"no start was judged: {shortened(reasons, 2000)}")
        finalists = sorted(rows, key=lambda name: -rows[name].mean)[:FINALISTS]
        for name in finalists:
            if self._has_time(f"scales per expert of {name}"):
                rows[name] = self._own_scales(name, rows[name])
        learned = self._learn_from(finalists, rows) if learn else {}
        best = max(rows, key=lambda name: rows[name].mean)
        warn_if_none(rows[best])
        run = learned.get(best) or self.settle(rows[best])
        return Choice(rows, best, run, learned)

    def _learn_from(self, finalists: Sequence[str], rows: dict[str, Trial]) -> dict[str, Path]:
        """Learn from every finalist: row -> run; adds to `rows`."""
        runs: dict[str, Path] = {}
        for name in finalists:
            if self._has_time(row := self._row(name)):
                runs[row], rows[row] = self._learn(row, rows[name])
        return runs

    def _try(self, name: str, judge: Judged) -> Trial | None:
        """The best common scale of a start; None if there is no time, or it cannot be made."""
        if not self._has_time(name):
            return None
        try:
            found = common_scale(judge, self.K, judge.start.scales)
        except ValueError as error:
            self.problems.append(str(error))
            warnings.warn(f"{name} is left out: {error}", stacklevel=2)
            return None
        finally:
            judge.release()  # one model in memory at a time
        print(f"{name}: recovers {found.mean:.3f} at scale {found.scales[0]:.2f}", flush=True)
        return found

    def _own_scales(self, name: str, common: Trial) -> Trial:
        """The better of a common scale and one per expert, chosen by examples that the fits learn from."""
        judge = self.judged[name]
        found = judge(own_scales(judge.learning, common.scales))
        judge.release()
        return max(common, found, key=lambda trial: trial.mean)

    @property
    def _grouping(self) -> dict[str, Any]:
        """The fits' changes of the grouping; none unless the granularity is `tensor`."""
        if not learns_in_chunks(self.settings.module.recipe):
            return {}
        return {"recipe.grouping.granularity": "chunk", "recipe.grouping.chunks": CHUNKS}

    def _row(self, start: str) -> str:
        """The row of what is learned from a start."""
        return f"learned from {start}" + (f", {CHUNKS} chunks per tensor" if self._grouping else "")

    def _learn(self, row: str, trial: Trial) -> tuple[Path, Trial]:
        """Learn from a start: the run, and what its best step recovers."""
        folder = f"learned-{_slug(trial)}" + ("-chunks" if self._grouping else "")
        changes = {**self._from(trial, folder), **self._grouping, "trainer.callbacks": self._callbacks()}
        settings = self._settings(folder, changes)
        clock = monotonic()
        self._fit(settings)
        (stopped,) = [c for c in settings.trainer.callbacks if isinstance(c, StopOnHeldOut)]  # type: ignore[attr-defined]
        assert stopped.best is not None
        shares = tuple(stopped.recovered[stopped.best[0]])
        return settings.run, Trial(row, trial.scales, shares, monotonic() - clock, trial.weights)

    def _callbacks(self) -> list[Any]:
        """The configuration's callbacks, and StopOnHeldOut."""
        given = list(self.trainer.get("callbacks") or [])
        stops = any(str(one.get("class_path", "")).endswith("StopOnHeldOut") for one in given)
        return given if stops else [*given, {"class_path": "trainmerge.StopOnHeldOut"}]

    def settle(self, trial: Trial) -> Path:
        """A run folder without steps at a trial's coefficients."""
        folder = _slug(trial)
        settings = self._settings(folder, {**self._from(trial, folder), "trainer.max_steps": 0})
        self._fit(settings)
        return settings.run

    def _from(self, trial: Trial, name: str) -> dict[str, Any]:
        """The changes of the configuration that begin at a trial."""
        judge = self.judged[trial.start]
        file, own = self.place / f"{name}-start.safetensors", judge.inputs.coefficients
        save_coefficients(Coefficients(own.experts, own.layout, judge.at(trial.scales)), file)
        judge.release()
        return {
            "recipe.preprocess": to_config(judge.inputs.recipe.preprocess),
            "model.initial": str(file),
        }

    def _fit(self, settings: FitSettings) -> None:
        share_generated(self.settings.module.settings.workspace, settings.module.settings.workspace)
        fit(
            settings.module, settings.data, settings.trainer, settings.run, settings.resume,
            config=settings.text, memory=self.memory or settings.memory,
        )  # fmt: skip

    def _settings(self, name: str, changes: Mapping[str, Any]) -> FitSettings:
        return from_config(self.config, self.place / name, {**self.changes, **changes})

    def _has_time(self, what: str) -> bool:
        if self.ends is None or monotonic() < self.ends:
            return True
        print(f"no time is left for: {what}", flush=True)
        return False


def learns_in_chunks(recipe: Recipe) -> bool:
    """Whether fits learn `CHUNKS` coefficients per tensor: where the granularity is `tensor`."""
    return recipe.grouping.granularity == "tensor"


def _slug(trial: Trial) -> str:
    """A folder's name for the run that begins at a trial."""
    return f"{trial.start.lower().replace(' ', '-')}-{digest(repr(trial.scales), length=6)}"
