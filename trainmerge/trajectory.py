"""The coefficients' path over the steps of a fit, on disk: at most about a megabyte, however long the fit.

The file is raw records, each a step (int64) and the coefficients after it (K x G float32); the shape comes
from `coefficients.safetensors`. Step s is kept if it is a multiple of the stride, the smallest power of two
that leaves few enough records up to the run's last step: so the file depends on how far the run is, never on
where it was interrupted.

Legend: `K` experts, `G` coefficient groups.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from trainmerge.coefficients import Coefficients
from trainmerge.module import MergeModule
from trainmerge.run_folder import RunFolder

FEWEST, MOST = 16, 128  # records
NUMBERS = 1 << 18  # in all records together, where that leaves `FEWEST` of them


class Trajectory(NamedTuple):
    """Coefficients at some steps; step 0 is where they start."""

    steps: Tensor  # [S] int64
    values: Tensor  # [S, K, G] float32


def capacity(numbers: int) -> int:
    """How many records of `numbers` coefficients are kept at most."""
    return min(MOST, max(FEWEST, NUMBERS // numbers))


def stride(step: int, numbers: int) -> int:
    """Every which step is kept of a run that has come to `step`.

    >>> [stride(step, numbers=1) for step in (0, 127, 128, 1000)]
    [1, 1, 2, 8]
    """
    result = 1
    while step // result >= capacity(numbers):
        result *= 2
    return result


def read_trajectory(path: Path, experts: int, groups: int) -> Trajectory | None:
    """The whole records of a file; None if it is not there or has none."""
    kind = _record(experts, groups)
    if not path.is_file() or path.stat().st_size < kind.itemsize:
        return None
    records = np.fromfile(path, kind, count=path.stat().st_size // kind.itemsize)
    return Trajectory(
        torch.from_numpy(records["step"].copy()), torch.from_numpy(records["values"].astype("f4"))
    )


class KeepTrajectory(Callback):
    """Append the coefficients after each kept step; a resumed run drops the records it will write again."""

    def __init__(self, folder: RunFolder) -> None:
        self.path = folder.trajectory

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        coefficients, step = _coefficients(pl_module), trainer.global_step
        self._thin(step, coefficients)
        if step == 0:
            self._append(0, coefficients)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, coefficients = trainer.global_step, _coefficients(pl_module)
        numbers = coefficients.raw.numel()
        if not trainer.is_global_zero or step % stride(step, numbers):
            return
        if stride(step, numbers) > stride(step - 1, numbers):
            self._thin(step - 1, coefficients, every=stride(step, numbers))
        self._append(step, coefficients)

    def _append(self, step: int, coefficients: Coefficients) -> None:
        record = np.zeros(1, _record(*coefficients.raw.shape))
        record["step"], record["values"] = step, coefficients().detach().float().cpu().numpy()
        with self.path.open("ab") as file:
            file.write(record.tobytes())

    def _thin(self, last: int, coefficients: Coefficients, every: int = 0) -> None:
        """Keep only records that a run of `last` steps has; a half-written one goes too."""
        kind = _record(*coefficients.raw.shape)
        if last == 0:
            self.path.unlink(missing_ok=True)
        if not self.path.exists():
            return
        records = np.fromfile(self.path, kind, count=self.path.stat().st_size // kind.itemsize)
        every = every or stride(last, coefficients.raw.numel())
        kept = records[(records["step"] <= last) & (records["step"] % every == 0)]
        aside = self.path.with_suffix(".tmp")
        aside.write_bytes(kept.tobytes())
        aside.replace(self.path)


def _coefficients(module: pl.LightningModule) -> Coefficients:
    assert isinstance(module, MergeModule)
    return module.coefficients


def _record(experts: int, groups: int) -> np.dtype[np.void]:
    return np.dtype([("step", "<i8"), ("values", "<f4", (experts, groups))])
