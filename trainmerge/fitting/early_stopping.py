"""Stop a fit when its calibration loss no longer falls. No label is read."""

import math
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from trainmerge.system.ranges import check_option


class StopWhenFlat(Callback):
    """Stop when the smoothed loss has had no new minimum for `patience` steps.

    Lightning's EarlyStopping acts at the end of epochs, and a fit has none. The smoothed loss is a
    bias-corrected exponential mean. Its state is in the snapshots, so a resumed run stops at the same step as
    an uninterrupted one.

    Args:
        patience: Steps without a new minimum.
        smoothing: Decay of the exponential mean, in [0, 1).
        least: The least decrease that counts as a new minimum.
    """

    def __init__(self, patience: int = 20, smoothing: float = 0.9, least: float = 0.0) -> None:
        check_option("StopWhenFlat.patience", patience, int, "[1, inf)")
        check_option("StopWhenFlat.smoothing", smoothing, float, "[0, 1)")
        check_option("StopWhenFlat.least", least, float, "[0, inf)")
        self.patience, self.smoothing, self.least = patience, smoothing, least
        self.total, self.weight = 0.0, 0.0
        self.lowest, self.lowest_step = math.inf, 0
        self.stopped = 0  # the step after which it stopped

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or self.stopped > 0

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss: Tensor = trainer.strategy.reduce(trainer.callback_metrics["loss"], reduce_op="mean")
        if self.flat(float(loss), trainer.global_step):
            self.stopped = trainer.global_step
            trainer.should_stop = True
            if trainer.is_global_zero:
                print(f"stopped after step {self.stopped}: no lower loss for {self.patience} steps")

    def flat(self, loss: float, step: int) -> bool:
        """Record the loss of step `step`; returns whether to stop."""
        self.total = self.smoothing * self.total + (1 - self.smoothing) * loss
        self.weight = self.smoothing * self.weight + (1 - self.smoothing)
        mean = self.total / self.weight
        if mean < self.lowest - self.least:
            self.lowest, self.lowest_step = mean, step
        return step - self.lowest_step >= self.patience

    @override
    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs to stop at the same step."""
        names = ("total", "weight", "lowest", "lowest_step", "stopped")
        return {name: getattr(self, name) for name in names}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the step of `state_dict`."""
        for name, value in state_dict.items():
            setattr(self, name, value)
