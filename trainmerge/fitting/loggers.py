"""Log the coefficients to users' loggers: numbers per step, and a heat map at the end."""

from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.logger import Logger
from typing_extensions import override

from trainmerge.fitting.module import MergeModule
from trainmerge.report.heatmap import heatmap
from trainmerge.report.picture import style


class LogCoefficients(Callback):
    """Mean, smallest and largest coefficient of each expert at every step; the heat map at the end."""

    def __init__(self, loggers: list[Logger]) -> None:
        self.loggers = loggers

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, MergeModule)
        step = trainer.global_step - 1  # as Lightning counts what is logged
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step % every or not trainer.is_global_zero:
            return
        values = pl_module.coefficients().detach()
        numbers = {
            f"coefficients/{name}/{what}": float(number)
            for name, row in zip(pl_module.coefficients.experts, values, strict=True)
            for what, number in (("mean", row.mean()), ("min", row.min()), ("max", row.max()))
        }
        for logger in self.loggers:
            logger.log_metrics(numbers, step)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, MergeModule)
        if not trainer.is_global_zero:
            return
        coefficients = pl_module.coefficients
        with style():
            picture = heatmap(
                coefficients.experts,
                coefficients.layout,
                coefficients().detach().cpu(),
                float(pl_module.start.mean()),
            )
            image = pixels(picture.figure)
        for logger in self.loggers:
            show(logger, image, trainer.global_step)


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """The figure on white, [height, width, 3]."""
    figure.set_facecolor("white")
    figure.set_dpi(100)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]


def show(logger: Logger, image: NDArray[np.uint8], step: int) -> None:
    """Log the picture, if the logger takes images."""
    match logger:
        case TensorBoardLogger():
            logger.experiment.add_image("coefficients", image, step, dataformats="HWC")
        case WandbLogger():
            logger.log_image("coefficients", [image])
        case MLFlowLogger():
            logger.experiment.log_image(logger.run_id, image, f"coefficients-{step}.png")


def move_table(logger: CSVLogger, step: int) -> None:
    """Move the table aside before a run resumed at `step` starts a new one, which would delete it."""
    table = Path(logger.log_dir) / "metrics.csv"
    if step and table.is_file():
        moved = table.with_name(f"metrics-until-{step}.csv")
        table.replace(moved)
        print(f"{moved}: the steps before this one; CSVLogger begins {table.name} anew")
