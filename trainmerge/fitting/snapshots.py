"""Snapshots of a run, and its reaction to signals."""

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import Callback
from typing_extensions import override

from trainmerge.fitting.checkpoint_file import LocalFile
from trainmerge.fitting.early_stopping import StopWhenFlat
from trainmerge.fitting.held_out_stopping import StopOnHeldOut
from trainmerge.fitting.metrics_log import log_before_saving
from trainmerge.fitting.module import MergeModule
from trainmerge.fitting.written_record import keep_generated
from trainmerge.run.folder import RunFolder
from trainmerge.run.saved import new_snapshot
from trainmerge.system.atomic import sync

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: try again
EXIT_INTERRUPTED = 130  # 128 + SIGINT
STOP = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(Exception):
    """A signal stopped the run.

    Args:
        words: What was saved, and how to resume.
        code: The process's exit code: `EXIT_INTERRUPTED` after Ctrl-C.
    """

    def __init__(self, words: str, code: int = EXIT_PREEMPTED) -> None:
        super().__init__(words)
        self.code = code


class Snapshots(Callback):
    """Save every `every` steps, at the last step, and when a signal stops the run; keep only the latest.

    A signal handler may interrupt anything, so it only sets a flag. At the end of the step all processes stop
    if any of them got a signal. Ctrl-C before the first step, or pressed twice, stops at once; the last
    snapshot is complete at any moment.
    """

    def __init__(self, folder: RunFolder, every: int) -> None:
        self.folder, self.every = folder, every
        self._stop = self._stopping = False  # this process got a signal; all processes stop
        self._steps = self._interrupted = False  # steps have begun; Ctrl-C was pressed
        self._saved = -1  # the last saved step

    @contextmanager
    def listening(self) -> Iterator[None]:
        """In this context, SIGTERM, SIGUSR1 and Ctrl-C stop the run at the end of the step."""
        handlers = dict.fromkeys(STOP, self._stop_later)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a background job ignores it
            handlers[signal.SIGINT] = self._interrupt  # Lightning would exit with 1
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # which writes to TMPDIR first
            trainer.strategy.checkpoint_io = LocalFile()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning would now register handlers that broadcast inside the handler, which can hang in another
        # collective (pytorch-lightning #20806), and that requeue Slurm jobs in the middle of a step.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        assert isinstance(pl_module, MergeModule)
        keep_generated(self.folder, pl_module, trainer.datamodule)  # type: ignore[attr-defined]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.strategy.reduce_boolean_decision(self._stop, all=False):
            raise self._preempted(f"before step {trainer.global_step + 1}")
        self._steps = True

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._stopping:  # now that the step's metrics are logged too
            trainer.strategy.barrier()  # if one process left early, its launcher would end the others
            raise self._preempted(f"after step {trainer.global_step}")

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        check_finite(trainer, pl_module)
        # All processes stop if any got a signal, because saving is collective.
        self._stopping = trainer.strategy.reduce_boolean_decision(self._stop, all=False)
        last = step == trainer.max_steps or trainer.should_stop
        if self._stopping or step % self.every == 0 or last:
            if trainer.is_global_zero:
                log_before_saving(trainer)
            self._save(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps = False
        if self._saved != trainer.global_step < trainer.max_steps:  # ended early: by `max_time`, say
            self._save(trainer, pl_module)
            if trainer.is_global_zero:
                print(f"stopped after step {trainer.global_step} of {trainer.max_steps}")

    def _stop_later(self, *_: int | FrameType | None) -> None:
        self._stop = True

    def _interrupt(self, *_: int | FrameType | None) -> None:
        at_once = self._stop or not self._steps
        self._stop = self._interrupted = True
        if at_once:
            raise self._preempted("at once")

    def _preempted(self, when: str) -> Preempted:
        code = EXIT_INTERRUPTED if self._interrupted else EXIT_PREEMPTED
        return Preempted(f"stopped {when}; run the same command again to resume from the last snapshot", code)

    def _save(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save a snapshot and its coefficients; the logs up to it are on disk before."""
        assert isinstance(module, MergeModule)
        step, folder = trainer.global_step, self.folder
        if trainer.is_global_zero and folder.trajectory.exists():
            sync(folder.trajectory)
        last = _last_step(trainer)
        with new_snapshot(folder, module.coefficients, step, last, trainer.is_global_zero) as path:
            trainer.save_checkpoint(path)
        self._saved = step


def _last_step(trainer: pl.Trainer) -> int:
    """The step at which the fit is finished: the current one, if a callback stopped it."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    stops = StopWhenFlat | StopOnHeldOut
    stopped = any(isinstance(callback, stops) and callback.stopped for callback in callbacks)
    return trainer.global_step if stopped else trainer.max_steps


def check_finite(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Raise ValueError if the step's losses or the updated coefficients are NaN or infinite."""
    losses = {
        key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("losses/")
    }
    bad = [key.removeprefix("losses/") for key, loss in losses.items() if not math.isfinite(loss)]
    if bad or not all(bool(parameter.isfinite().all()) for parameter in module.parameters()):
        what = f"the loss of {', '.join(bad)} is" if bad else "the coefficients are"
        raise ValueError(
            f"step {trainer.global_step}: {what} not finite; the step was not saved. Lower the learning "
            "rate, or check for examples with no unmasked token"
        )
