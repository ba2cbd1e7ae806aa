"""The losses and the coefficients of every step, on disk."""

import json
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.apply_func import convert_tensors_to_scalars
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only
from typing_extensions import override

from trainmerge.fitting.module import MergeModule
from trainmerge.run.folder import RunFolder
from trainmerge.run.trajectory import append
from trainmerge.system.atomic import append_line, sync, write_whole


class JsonLines(Logger):
    """Append metrics to a file, one JSON object per step."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._ahead: tuple[int, frozenset[str]] = (-1, frozenset())  # the step written early, and its keys

    @property
    @override
    def name(self) -> str:
        return "metrics"

    @property
    @override
    def version(self) -> str:
        return ""

    @override
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Log nothing: the hyperparameters are in the run folder's recipe and config."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        early = self._ahead[1] if step == self._ahead[0] else frozenset()
        values = {key: value for key, value in metrics.items() if key != "epoch" and key not in early}
        if values or not early:
            append_line(self.path, json.dumps({"step": step, **values}))

    def log_early(self, metrics: dict[str, float], step: int) -> None:
        """Force a step's line to disk now; `log_metrics` of the same step adds only what is new."""
        self.log_metrics(metrics, step)
        if self.path.exists():
            sync(self.path)
        self._ahead = (step, frozenset(metrics))

    def keep_until(self, step: int) -> None:
        """Drop the lines of `step` and later, and an incomplete line of a killed run."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text().splitlines() if _step_of(line) < step]
        write_whole(self.path, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # not a line of ours
        return float("inf")


def log_before_saving(trainer: pl.Trainer) -> None:
    """Force the logged line of the current step to disk; Lightning itself logs a step after its callbacks.

    Otherwise a process killed between a snapshot and its step's line would lose the line for ever.
    """
    connector = trainer._logger_connector
    if not connector.should_update_logs:
        return
    values = convert_tensors_to_scalars(connector.metrics["log"])
    for logger in trainer.loggers:
        if isinstance(logger, JsonLines):
            logger.log_early(dict(values), trainer.fit_loop.epoch_loop._batches_that_stepped)


class TrajectoryLog(Callback):
    """Append the coefficients after each step that the trajectory records."""

    def __init__(self, folder: RunFolder) -> None:
        self.path = folder.trajectory

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, MergeModule)
        if trainer.is_global_zero and trainer.global_step == 0:
            append(self.path, 0, pl_module.coefficients())

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, MergeModule)
        if trainer.is_global_zero:
            append(self.path, trainer.global_step, pl_module.coefficients())
