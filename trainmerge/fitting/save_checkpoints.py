"""Lightning's Trainer leaves a run whose checkpoints can be merged."""

import shutil
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from typing_extensions import override

from trainmerge.coefficients.checkpoint_average import Schedule
from trainmerge.run.checkpoints_of_run import write_merge
from trainmerge.system.atomic import rename_whole, temporary_folder
from trainmerge.system.ranges import check_option
from trainmerge.system.text import listed

PREFIX = "step-"


class SaveForMerging(Callback):
    """Every so many steps, save a LightningModule's transformers or peft model, and write merge.yaml.

    `trainmerge merge FOLDER/merge.yaml OUT` then averages the last ones. A checkpoint is a folder `step-N`,
    as `save_pretrained` writes it; older ones are removed. Of sharded models save sharded checkpoints, and
    use `unshard`.

    Args:
        folder: Where the checkpoints go.
        every: Optimiser steps between two of them.
        last: Keep the last so many.
        model: Name of the module's attribute with the model.
        schedule: Of `trainmerge.CheckpointAverage`.
        tokenizer: A tokenizer or processor that is saved with each of them.

    Raises:
        ValueError: at the start, the module has no such attribute, it has no `save_pretrained`, or the folder
            has checkpoints of another run.
    """

    def __init__(
        self,
        folder: str | Path,
        every: int,
        last: int = 8,
        model: str = "model",
        schedule: Schedule = "equal",
        tokenizer: Any = None,
    ) -> None:
        check_option("SaveForMerging.folder", str(folder), str)
        check_option("SaveForMerging.every", every, int, "[1, inf)")
        check_option("SaveForMerging.last", last, int, "[2, inf)")
        check_option("SaveForMerging.schedule", schedule, Schedule)
        self.folder, self.every, self.last = Path(folder).absolute(), every, last
        self.model, self.schedule, self.tokenizer = model, schedule, tokenizer

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not hasattr(getattr(pl_module, self.model, None), "save_pretrained"):
            raise ValueError(
                f"SaveForMerging: {type(pl_module).__name__}.{self.model} has no save_pretrained: name the "
                "attribute of the model (model=...). For plain modules there is tm.merge_state_dicts"
            )
        late = [path.name for path in self.folder.glob(f"{PREFIX}*") if _step(path) > trainer.global_step]
        if late and trainer.is_global_zero:
            raise ValueError(
                f"{self.folder}: {listed(sorted(late))} are not of this run, which begins after step "
                f"{trainer.global_step}: name a new folder, or remove them"
            )

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step  # 0 until the first accumulated batches are complete
        target = self.folder / f"{PREFIX}{step}"
        if not step or step % self.every or not trainer.is_global_zero or target.exists():
            return  # accumulated batches end with the same step
        self.folder.mkdir(parents=True, exist_ok=True)
        with temporary_folder(self.folder, "saving") as place:
            getattr(pl_module, self.model).save_pretrained(place / "model")
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(place / "model")
            rename_whole(place / "model", target)
        found = sorted(self.folder.glob(f"{PREFIX}*"), key=_step)
        write_merge(self.folder, found, self.last, self.schedule)
        for old in found[: -self.last]:
            shutil.rmtree(old)


def _step(path: Path) -> float:
    """The step in a checkpoint's name; infinite in a name that is no step's."""
    number = path.name.removeprefix(PREFIX)
    return int(number) if number.isdecimal() else float("inf")
