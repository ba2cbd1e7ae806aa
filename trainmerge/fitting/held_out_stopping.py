"""Stop a fit when its merge recovers no more of the experts on held-out examples. No label is read.

Legend: `K` experts, `G` coefficient groups.
"""

import math
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from trainmerge.data.calibration import Calibration
from trainmerge.fitting.held_out import EXAMPLES, HeldOutJudge, mean_share
from trainmerge.fitting.module import MergeModule
from trainmerge.system.ranges import check_option


class StopOnHeldOut(Callback):
    """Stop when the merge recovers no more of its experts on held-out examples, and keep the best step.

    Every `every` steps the mean over experts, by their tasks' weights, of r = 1 - loss(merge) / loss(base) is
    measured on the examples that `data.held_out` keeps from the fit (`trainmerge.fitting.held_out`), before
    the first step too. The run's coefficients are then those of the best step, whatever came after it. Its
    state is in the snapshots.

    Args:
        every: Steps between two measurements.
        patience: Measurements without a rise.
        least: The least rise that counts.
        examples: Measure the first so many held-out examples of each expert; None measures all.
    """

    def __init__(
        self, every: int = 10, patience: int = 2, least: float = 0.002, examples: int | None = EXAMPLES
    ) -> None:
        check_option("StopOnHeldOut.every", every, int, "[1, inf)")
        check_option("StopOnHeldOut.patience", patience, int, "[1, inf)")
        check_option("StopOnHeldOut.least", least, float, "[0, inf)")
        check_option("StopOnHeldOut.examples", examples, int | None, "[1, inf)")
        self.every, self.patience, self.least, self.examples = every, patience, least, examples
        self.recovered: dict[int, list[float]] = {}  # step -> r of every expert
        self.best: tuple[int, Tensor] | None = None  # the best step and its coefficients [K, G]
        self.highest = -math.inf  # mean r of the last rise that counted
        self.waited = self.stopped = 0
        self._judge: HeldOutJudge | None = None
        self.weights: list[float] = []  # of the tasks; none: equal

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, MergeModule)
        data: Calibration = trainer.datamodule  # type: ignore[attr-defined]
        with trainer.strategy.precision_plugin.forward_context():
            given, model = pl_module.inputs(data), pl_module.resident
            self._judge = HeldOutJudge.of(given, model, pl_module.objective, self.examples)
        self.weights = [expert.weight for expert in pl_module.recipe.experts.values()]
        if trainer.global_step == 0:
            self._measure(trainer, pl_module)
        trainer.should_stop = trainer.should_stop or self.stopped > 0

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, MergeModule)
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self._measure(trainer, pl_module)
        if self.waited >= self.patience and not self.stopped:
            self.stopped = trainer.global_step
            trainer.should_stop = True
            if trainer.is_global_zero and self.best:
                print(f"stopped after step {self.stopped}: the best on held-out examples is {self.best[0]}")

    def _measure(self, trainer: pl.Trainer, module: MergeModule) -> None:
        """Record the recovered shares of this step."""
        assert self._judge is not None
        with trainer.strategy.precision_plugin.forward_context():
            shares = self._judge.recovered()
        self.add(trainer.global_step, shares, module.coefficients().detach().cpu())

    def add(self, step: int, shares: Tensor, coefficients: Tensor) -> None:
        """Record the shares [K] and the coefficients [K, G] of a step."""
        before = mean_share(self.recovered[self.best[0]], self.weights) if self.best else -math.inf
        self.recovered[step] = shares.tolist()
        mean = mean_share(self.recovered[step], self.weights)
        if mean > before:
            self.best = (step, coefficients.clone())
        self._wait(mean)

    def _wait(self, mean: float) -> None:
        """Count a measurement with or without a rise that counts."""
        if mean > self.highest + self.least:
            self.highest, self.waited = mean, 0
        else:
            self.waited += 1

    @override
    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs to stop, and to keep, the same step."""
        step, values = self.best or (0, torch.empty(0))
        measured = {str(at): own for at, own in self.recovered.items()}
        state = {"recovered": measured, "best_step": step, "best": values}
        return {**state, "highest": self.highest, "waited": self.waited, "stopped": self.stopped}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the step of `state_dict`."""
        self.recovered = {int(at): own for at, own in state_dict["recovered"].items()}
        self.best = (state_dict["best_step"], state_dict["best"]) if self.recovered else None
        for name in ("highest", "waited", "stopped"):
            setattr(self, name, state_dict[name])


def check_held_out(trainer: pl.Trainer, data: Calibration, keep_better: bool) -> None:
    """Raise ValueError for a trainer with StopOnHeldOut that has nothing to measure, or no last word."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not any(isinstance(callback, StopOnHeldOut) for callback in callbacks):
        return
    if not data.held_out:
        raise ValueError(
            "StopOnHeldOut measures held-out examples: set data.held_out to a share, such as 0.2"
        )
    if keep_better:
        raise ValueError("StopOnHeldOut keeps the best step itself: leave out model.keep_better")
