"""What a run does beside learning: snapshots, metrics on disk, progress."""

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from typing_extensions import override

from trainmerge.coefficients.coefficients import save_coefficients
from trainmerge.fitting.module import MergeModule
from trainmerge.run.folder import RunFolder
from trainmerge.system.atomic import naming, sync

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: run me again
EXIT_INTERRUPTED = 130  # 128 + SIGINT
STOP = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(Exception):
    """The run was told to stop by a signal.

    Args:
        words: What was saved, and how to go on.
        code: The process's exit code: `EXIT_INTERRUPTED` after Ctrl-C.
    """

    def __init__(self, words: str, code: int = EXIT_PREEMPTED) -> None:
        super().__init__(words)
        self.code = code


class Snapshots(Callback):
    """Save every `every` steps, at the last step, and when asked to stop; keep the latest only.

    A signal handler may interrupt anything, so it only sets a flag; the step's end acts on it, on all
    processes if any of them was told. Ctrl-C before the first step, or a second one, stops at once: the
    last snapshot is whole at any moment.
    """

    def __init__(self, folder: RunFolder, every: int) -> None:
        self.folder, self.every = folder, every
        self._stop = self._stopping = False  # told to, here; agreed, and saved
        self._steps = self._interrupted = False  # steps have begun; Ctrl-C was pressed
        self._saved = -1  # the last step that was

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, SIGTERM, SIGUSR1 and Ctrl-C mean a stop at the step's end."""
        handlers = dict.fromkeys(STOP, self._stop_later)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as of a job in the background
            handlers[signal.SIGINT] = self._interrupt  # Lightning's answer to it is to exit with 1
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning's own handlers, which it would register now, broadcast from inside a handler, where they
        # meet another collective and hang (pytorch-lightning #20806), and requeue Slurm jobs amid a step.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]

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
            trainer.strategy.barrier()  # a process that left would have its launcher end the others
            raise self._preempted(f"after step {trainer.global_step}")

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        check_finite(trainer, pl_module)
        # All processes stop if any was asked to: a save is a meeting of all of them.
        self._stopping = trainer.strategy.reduce_boolean_decision(self._stop, all=False)
        last = step == trainer.max_steps or trainer.should_stop
        if self._stopping or step % self.every == 0 or last:
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
        return Preempted(f"stopped {when}; the same command goes on from the last snapshot", code)

    def _save(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Coefficients first: whenever a run is killed, they are at least as late as the snapshot."""
        assert isinstance(module, MergeModule)
        path = self.folder.checkpoints / f"step-{trainer.global_step}.ckpt"
        aside = path.with_suffix(".saving")
        with naming(path):
            trainer.save_checkpoint(aside)
        self._saved = trainer.global_step
        if trainer.is_global_zero:
            save_coefficients(module.coefficients, self.folder.coefficients)
            sync(aside)
            aside.replace(path)
            for earlier, snapshot in self.folder.snapshots().items():
                if earlier < trainer.global_step:
                    snapshot.unlink()


def check_finite(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Raise ValueError if the step's losses, or what it made of the coefficients, are NaN or infinite."""
    losses = {
        key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("losses/")
    }
    bad = [key.removeprefix("losses/") for key, loss in losses.items() if not math.isfinite(loss)]
    if bad or not all(bool(parameter.isfinite().all()) for parameter in module.parameters()):
        what = f"the loss of {', '.join(bad)} is" if bad else "the coefficients are"
        raise ValueError(
            f"step {trainer.global_step}: {what} not finite; nothing of it was saved. Lower the learning "
            "rate, or look for examples without a token that counts"
        )
