"""Lightning's hooks of a fit's steps: an optimizer step, its checkpoint, its optimizer.

Legend: `K` experts, `G` coefficient groups.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from typing_extensions import override

from trainmerge.coefficients.anchor import Anchor
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.concrete_rows import ConcreteRows
from trainmerge.coefficients.frank_wolfe import FrankWolfe
from trainmerge.data.batch import Batch, Step
from trainmerge.data.calibration import Calibration
from trainmerge.fitting.foresight import foresight
from trainmerge.fitting.precision import scale_of, without_scaler
from trainmerge.fitting.step_gradient import StepGradient
from trainmerge.model.exact import exact
from trainmerge.model.one_pass import Predict
from trainmerge.model.resident import Resident
from trainmerge.plan.micro_batches import StepSchedule
from trainmerge.run.recipe import Recipe


class CoefficientSteps(pl.LightningModule, ABC):
    """The steps of a fit, given its merge, its losses and its settings; `MergeModule` has these.

    Its checkpoint contains the coefficients, the optimizer's state and what the run depends on.
    """

    recipe: Recipe
    coefficients: Coefficients
    start: Tensor  # [K, G]
    anchor: Anchor
    clip: float
    schedule: StepSchedule
    make_optimizer: OptimizerCallable
    make_scheduler: LRSchedulerCallable | None
    description: str
    machine: int = 0  # processes on this machine, once the trainer says; 0 is all

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    @property
    @abstractmethod
    def resident(self) -> Resident:
        """The merged model."""

    @abstractmethod
    def load(
        self,
        data: Calibration,
        device: torch.device | str,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """Prepare the model, once."""

    @property
    @abstractmethod
    def rule(self) -> nn.Module | None:
        """The aggregation of the experts' gradients; None is their sum."""

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The weighted loss of one expert's batch, with the model's `loss_scale`."""

    @override
    def setup(self, stage: str) -> None:
        """Load everything onto this process's device.

        Raises:
            TypeError: the trainer's datamodule is not a `Calibration`.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, Calibration):
            raise TypeError("fit with trainer.fit(module, datamodule=Calibration(...))")
        self.machine = self.trainer.num_devices
        strategy = self.trainer.strategy  # `self.device` is still the CPU here
        self.load(data, strategy.root_device, strategy.precision_plugin.forward_context)
        if scale := scale_of(strategy.precision_plugin):
            self.resident.merged.loss_scale = scale

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add to the checkpoint what the run depends on, its schedule, and the scale of float16 gradients."""
        checkpoint["trainmerge"], checkpoint["schedule"] = self.description, asdict(self.schedule)
        if self.resident.merged.loss_scale.active:
            checkpoint["loss_scale"] = self.resident.merged.loss_scale.state_dict()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue with the checkpoint's scale of float16 gradients."""
        if "loss_scale" in checkpoint:
            self.resident.merged.loss_scale.load_state_dict(checkpoint["loss_scale"])

    @override
    def training_step(self, step: Step, index: int) -> None:
        """One optimizer step: all tasks' losses at one merge."""
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        reports: list[dict[str, Tensor]] = []
        start, precision = self.start.to(self.device), self.trainer.strategy.precision_plugin
        ahead = self.trainer.world_size == 1 and self.resident.merged.writes_ahead
        moved = optimizer.optimizer, self.anchor, start, self.clip
        gradient = self._step_gradient(foresight(self.coefficients, *moved) if ahead else None)

        def closure() -> Tensor:
            with precision.forward_context():
                losses, slopes = gradient(step, self.global_step)
            reports.append(losses)
            optimizer.zero_grad()
            penalty = gradient.assign(slopes, self.anchor, start, self.clip)
            return torch.stack(list(losses.values())).sum() + penalty

        with without_scaler(precision), exact(self.coefficients.raw):  # an optimizer's products, say
            optimizer.step(closure)
        self.coefficients.project_()
        self.resident.merged.settle()
        self._step_scheduler()
        if isinstance(optimizer.optimizer, FrankWolfe):
            self.log("gap", optimizer.optimizer.gap())
        losses = reports[0]  # at the step's starting coefficients
        self.log("loss", torch.stack(list(losses.values())).sum(), prog_bar=True)
        # Not loss/NAME: a logger that stores each metric as a file would need `loss` as file and as folder.
        self.log_dict({f"losses/{name}": loss for name, loss in losses.items()})

    def _step_gradient(self, predict: Predict | None) -> StepGradient:
        return StepGradient(
            self.resident.merged,
            tuple(self.recipe.experts),
            self.loss,
            self.manual_backward,
            partial(self.trainer.strategy.reduce, reduce_op="mean"),
            self.schedule,
            self.rule,
            predict,
        )

    def _step_scheduler(self) -> None:
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
            scheduler.step()

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer of the coefficients, and its learning-rate schedule if there is one."""
        optimizer = self.make_optimizer(self.coefficients.parameters())
        ConcreteRows.follow(optimizer, self.coefficients)
        if self.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.make_scheduler(optimizer)}}
