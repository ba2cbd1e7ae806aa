"""Log of a fit's time and memory."""

import json
import sys
import time

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from typing_extensions import override

from trainmerge.run.folder import RunFolder
from trainmerge.system.atomic import append_line
from trainmerge.system.memory import anonymous, peak_resident


class UsageLog(Callback):
    """Append one JSON object when the fit ends, also on an error; a killed process writes none.

    `wall_seconds` and `cpu_seconds` include loading. `peak_bytes` is the process's peak resident memory,
    mapped files included; `anonymous_bytes` is its anonymous memory at the end (Linux only).
    """

    def __init__(self, folder: RunFolder) -> None:
        self.path = folder.usage
        self._wall, self._cpu, self._first, self._steps = 0.0, 0.0, 0, 0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._wall, self._cpu = time.monotonic(), time.process_time()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first = trainer.global_step

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer)

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero or not self.path.parent.is_dir():
            return
        line = {
            "first_step": self._first,
            "last_step": trainer.global_step,
            "wall_seconds": round(time.monotonic() - self._wall, 3),
            "cpu_seconds": round(time.process_time() - self._cpu, 3),
            "peak_bytes": peak_resident(),
            "anonymous_bytes": anonymous() if sys.platform == "linux" else None,
            "processes": trainer.world_size,
            "threads": torch.get_num_threads(),
        }
        append_line(self.path, json.dumps(line))
