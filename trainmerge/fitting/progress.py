"""Progress of a fit in a terminal, a notebook or a log file."""

import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, RichProgressBar, TQDMProgressBar
from typing_extensions import override


class PlainProgress(Callback):
    """One line per tenth of the run, for output that is not a terminal."""

    def __init__(self) -> None:
        self._began, self._first = 0.0, 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began, self._first = time.monotonic(), trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, total = trainer.global_step, trainer.max_steps
        if not trainer.is_global_zero:
            return
        if step % max(1, total // 10) == 0 or step == total:
            pace = (time.monotonic() - self._began) / max(1, step - self._first)
            loss = float(trainer.callback_metrics["loss"])
            left = f"{pace:.2f} s/step  {pace * (total - step):.0f} s left"
            print(f"step {step}/{total}  loss {loss:.4f}  {left}", flush=True)


class StepBar(RichProgressBar):
    """Rich's bar without the epoch number, which a fit does not have."""

    def _get_train_description(self, current_epoch: int) -> str:  # noqa: ARG002 - Lightning's signature
        return "fitting"


def progress_bar() -> Callback:
    """Rich's bar in a terminal, tqdm's in a notebook, plain lines elsewhere."""
    if "ipykernel" in sys.modules:
        return TQDMProgressBar(refresh_rate=1)
    return StepBar() if sys.stdout.isatty() else PlainProgress()
