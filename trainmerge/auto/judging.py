"""A start in memory, and what its merges recover of the experts on their examples.

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
from trainmerge.auto.trials import HELD_OUT, LEARNING, Examples, Trial, TrialLog
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.initial import read_initial
from trainmerge.coefficients.measured_presets import MeasuredPreset
from trainmerge.data.batch import Asks
from trainmerge.fitting.held_out import EXAMPLES, HeldOutJudge, judge_of
from trainmerge.fitting.prepare import FitInputs, Prepared, prepare
from trainmerge.objectives import Objective
from trainmerge.run.config import to_config
from trainmerge.run.heads import task_heads
from trainmerge.system.workspace import digest


class Judged:
    """Judges merges of one start. The model is loaded for the first merge that the log does not have.

    `base` is shared by all starts: the first one adds the base's losses [K] on each part of the examples,
    which are those of all.
    """

    def __init__(
        self,
        start: Start,
        inputs: FitInputs,
        objective: Objective,
        log: TrialLog,
        base: dict[Examples, Tensor],
    ) -> None:
        names, layout = tuple(inputs.recipe.experts), inputs.opened.layout
        recipe = replace(inputs.recipe, preprocess=start.preprocess)
        constraint = inputs.coefficients.constraint
        self._values = read_initial(start.initial, names, layout).expand(-1, len(layout.labels))  # [K, G]
        own = Coefficients(names, layout, constraint.project(self._values), constraint)
        self._made: Prepared | None = None
        self._judges: dict[Examples, HeldOutJudge] = {}
        self._base = base
        self.weights = tuple(expert.weight for expert in inputs.recipe.experts.values())
        self._measured = not isinstance(start.initial, MeasuredPreset)
        asks = Asks(embedding=judge_of(objective).asks.embedding)
        self.start, self.objective, self.log = start, objective, log
        self.inputs = replace(inputs, recipe=recipe, coefficients=own, initial=start.initial, asks=asks)

    def __call__(self, scales: Sequence[float]) -> Trial:
        """The trial on the held-out examples at these scales [K] of the start's coefficients."""
        return self._trial(scales, HELD_OUT)

    def learning(self, scales: Sequence[float]) -> Trial:
        """The same on examples that a fit learns from: many scales may be chosen by them."""
        return self._trial(scales, LEARNING)

    def _trial(self, scales: Sequence[float], by: Examples) -> Trial:
        key = digest(json.dumps([self._depends_on, list(scales), by]), length=32)
        if key not in self.log.known:
            clock = monotonic()
            shares = self.recovered(self.at(scales), by)
            found, seconds = tuple(shares.tolist()), monotonic() - clock
            trial = Trial(self.start.name, tuple(scales), found, seconds, self.weights, by)
            self.log.add(key, trial)
        return self.log.known[key]

    def at(self, scales: Sequence[float]) -> Tensor:
        """The coefficients [K, G] at these scales [K]: the nearest ones in the constraint's set."""
        if not self._measured:
            self._loaded()
        wanted = self._values * torch.tensor(scales, dtype=torch.float32)[:, None]
        return self.inputs.coefficients.constraint.project(wanted)

    def recovered(self, values: Tensor, by: Examples) -> Tensor:
        """Of each expert, [K], at coefficients [K, G]."""
        self.inputs.coefficients.reset_(values)
        return self._judge(by).recovered()

    def release(self) -> None:
        """Free the model's memory."""
        self._made = None
        self._judges.clear()

    @cached_property
    def _depends_on(self) -> list[object]:
        given, settings = self.inputs, self.inputs.settings
        recipe = replace(given.recipe, held_out={})  # scored, never judged by
        heads = task_heads(recipe, given.opened).values()
        return [
            given.opened.identity(),
            given.data.identity(),
            [head and head.identity() for head in heads],
            to_config([recipe, given.initial, given.coefficients.constraint, settings.quantise]),
            given.opened.layout.identity(),
            repr(judge_of(self.objective)),
            settings.weights,
        ]

    def _judge(self, by: Examples) -> HeldOutJudge:
        if by not in self._judges:
            made, data = self._loaded(), self.inputs.data
            part = data.held_out_part(EXAMPLES) if by == HELD_OUT else data.learning_part(EXAMPLES)
            judge = HeldOutJudge.on(part, self.inputs, made.resident, self.objective)
            if by not in self._base:
                self._base[by] = judge.base_losses
            vars(judge)["base_losses"] = self._base[by]  # sets the cached property
            self._judges[by] = judge
        return self._judges[by]

    def _loaded(self) -> Prepared:
        if self._made is None:
            self._made = made = prepare(self.inputs, "cpu", nullcontext)
            if made.start is not None:
                self._values, self._measured = made.start.expand_as(self._values).clone(), True
        return self._made
