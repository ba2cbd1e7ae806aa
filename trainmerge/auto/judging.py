"""A start in memory, and what its merges recover of the experts on the held-out examples.

Legend: `K` experts, `G` coefficient groups.
"""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from time import monotonic

import torch
from torch import Tensor

from trainmerge.auto.starts import Start
from trainmerge.auto.trials import Trial, TrialLog
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.initial import read_initial
from trainmerge.coefficients.measured_presets import MeasuredPreset
from trainmerge.data.batch import Asks
from trainmerge.fitting.held_out import HeldOutJudge, judge_of
from trainmerge.fitting.prepare import FitInputs, prepare
from trainmerge.objectives import Objective
from trainmerge.run.config import to_config
from trainmerge.system.workspace import digest


class Judged:
    """Judges merges of one start. The model is loaded for the first merge that the log does not have.

    `base` is shared by all starts: the first one adds the base's losses [K], which are those of all.
    """

    def __init__(
        self, start: Start, inputs: FitInputs, objective: Objective, log: TrialLog, base: list[Tensor]
    ) -> None:
        names, layout = tuple(inputs.recipe.experts), inputs.opened.layout
        recipe = replace(inputs.recipe, preprocess=start.preprocess)
        values = read_initial(start.initial, names, layout)
        own = Coefficients(names, layout, values, inputs.coefficients.constraint)
        self._model: HeldOutJudge | None = None
        self._base = base
        self.weights = tuple(expert.weight for expert in inputs.recipe.experts.values())
        self._values = own().detach().clone()  # judging changes the coefficients themselves
        self._measured = not isinstance(start.initial, MeasuredPreset)
        asks = Asks(embedding=judge_of(objective).asks.embedding)
        self.start, self.objective, self.log = start, objective, log
        self.inputs = replace(inputs, recipe=recipe, coefficients=own, initial=start.initial, asks=asks)

    def __call__(self, scales: Sequence[float]) -> Trial:
        """The trial at these scales [K] of the start's coefficients."""
        key = digest(json.dumps([self._depends_on, list(scales)]), length=32)
        if key not in self.log.known:
            clock = monotonic()
            shares = self.recovered(self.at(scales))
            found, seconds = tuple(shares.tolist()), monotonic() - clock
            trial = Trial(self.start.name, tuple(scales), found, seconds, self.weights)
            self.log.add(key, trial)
        return self.log.known[key]

    def at(self, scales: Sequence[float]) -> Tensor:
        """The coefficients [K, G] at these scales [K]: the nearest ones in the constraint's set."""
        if not self._measured:
            self._load()
        wanted = self._values * torch.tensor(scales, dtype=torch.float32)[:, None]
        return self.inputs.coefficients.constraint.project(wanted)

    def recovered(self, values: Tensor) -> Tensor:
        """Of each expert, [K], at coefficients [K, G]."""
        self.inputs.coefficients.reset_(values)
        return self._load().recovered()

    def release(self) -> None:
        """Free the model's memory."""
        self._model = None

    @cached_property
    def _depends_on(self) -> list[object]:
        given = self.inputs
        return [
            given.opened.identity(),
            given.data.identity(),
            to_config(given.recipe.preprocess),
            to_config(given.initial),
            given.opened.layout.identity(),
            repr(judge_of(self.objective)),
            given.settings.weights,
            self.weights,
        ]

    def _load(self) -> HeldOutJudge:
        if self._model is None:
            made = prepare(self.inputs, "cpu", nullcontext)
            if made.start is not None:
                self._values, self._measured = made.start.expand_as(self._values).clone(), True
            self._model = HeldOutJudge.of(self.inputs, made.resident, self.objective)
            if not self._base:
                self._base.append(self._model.base_losses)
            vars(self._model)["base_losses"] = self._base[0]  # sets the cached property
        return self._model
