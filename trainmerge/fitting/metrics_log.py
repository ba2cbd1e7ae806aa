"""The losses and the coefficients of every step, on disk."""

import json
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only
from typing_extensions import override

from trainmerge.fitting.module import MergeModule
from trainmerge.run.folder import RunFolder
from trainmerge.run.trajectory import append
from trainmerge.system.atomic import write_whole


class JsonLines(Logger):
    """Append metrics to a file, one JSON object per step."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

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
        values = {key: value for key, value in metrics.items() if key != "epoch"}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def keep_until(self, step: int) -> None:
        """Drop the lines of `step` and later, and an incomplete line of a killed run."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text().splitlines() if _step_of(line) < step]
        write_whole(self.path, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")


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
