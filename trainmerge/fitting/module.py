"""The thin LightningModule: materialise, one forward and backward a task, one step of the coefficients.

Its checkpoint holds coefficients and optimizer, kilobytes; the model and the task vectors are hidden
from Lightning, which would otherwise save, move and synchronise them.

Legend: `K` experts, `G` coefficient groups.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from typing_extensions import override

from trainmerge.coefficients.aggregation import combined
from trainmerge.coefficients.anchor import Anchor
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.constraints import Constraint, Free
from trainmerge.coefficients.frank_wolfe import FrankWolfe
from trainmerge.coefficients.initial import read_initial
from trainmerge.coefficients.presets import MeasuredPreset, Preset
from trainmerge.data.batch import Asks, Batch, Step
from trainmerge.data.calibration import Calibration
from trainmerge.model.activation_checkpointing import recompute_blocks
from trainmerge.model.expert_statistics import ExpertStatistics
from trainmerge.model.resident import Resident, load_resident
from trainmerge.model.teachers import BUDGET, Record, record_teachers
from trainmerge.objectives import Entropy, Objective
from trainmerge.plan.micro_batches import StepSchedule, rounds
from trainmerge.preprocess import Informed
from trainmerge.preprocess.subspace import shared_subspaces
from trainmerge.run.recipe import Recipe
from trainmerge.task_vectors.quantise import Quantise


class MergeModule(pl.LightningModule):
    """Learns a merge's coefficients from unlabeled data.

    Args:
        recipe: What is merged.
        objective: The loss of a batch; the tasks' losses are weighed by `Expert.weight` and summed.
        constraint: The set that coefficients stay in.
        initial: Where they start: one number, one an expert, a `coefficients.safetensors`, or a preset.
        anchor: A pull of the coefficients back to their start, or to given values.
        optimizer: Made from the coefficients, as in any LightningModule. One that asks for several losses a
            step (L-BFGS) gets them, all on the step's batches.
        lr_scheduler: Stepped once an optimizer step.
        keep_better: After the fit, compare the loss over all calibration examples with the start's, and leave
            whichever coefficients have the lower one.
        combine: How the experts' coefficient gradients become one: a `torchjd.aggregation` rule, or any
            module [m, n] -> [n]; every expert then has its own backward. Their sum by default.
        subspace: Leave out what a weight's gradient has in the experts' shared subspace, of
            floor(min(rows, columns) / subspace) directions, as DOGE does; 0 leaves nothing out.
        clip: The gradient's norm over all coefficients is cut to this; 0 leaves it as it is.
        weights: `stored` holds the resident model as the base's files do; `bfloat16` rounds the merge once to
            it, which halves a float32 model. Coefficients and reductions are float32 in any case.
        tasks_per_backward: Tasks whose forwards share one backward: each backward reads the task vectors
            once, and holds these tasks' activations.
        keep_gradients: Sum the weights' gradients over a step's backwards and read the task vectors once for
            all of them, for the memory of one more model.
        teacher_budget: Bytes for the experts' recorded probabilities: all of them if they fit, else the
            largest.
        quantise: Learn on smaller task vectors, `Int8` or `Ternary`; the export is from the exact ones.
        workspace: Folder for preprocessed task vectors, merged adapters and recorded experts.
        sharded: Share the model among the trainer's processes instead of one whole on each: for models that
            no single device holds. The trainer's strategy stays `ddp`; coefficients do not depend on this.
    """

    def __init__(
        self,
        recipe: Recipe,
        objective: Objective = Entropy(),  # noqa: B008 - frozen
        constraint: Constraint = Free(),  # noqa: B008 - frozen
        initial: float | Sequence[float] | str | Preset = 0.3,
        anchor: Anchor = Anchor(),  # noqa: B008 - frozen
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
        keep_better: bool = False,
        combine: torch.nn.Module | None = None,
        subspace: int = 0,
        clip: float = 0.0,
        weights: Literal["stored", "bfloat16"] = "stored",
        tasks_per_backward: int = 1,
        keep_gradients: bool = False,
        teacher_budget: int = BUDGET,
        quantise: Quantise | None = None,
        workspace: str = "workspace",
        sharded: bool = False,
    ) -> None:
        super().__init__()
        if subspace < 0:
            raise ValueError(f"subspace must be 0 or more, not {subspace}")
        if tasks_per_backward < 1:
            raise ValueError(f"tasks_per_backward must be at least 1, not {tasks_per_backward}")
        if keep_gradients and combine is not None:
            raise ValueError("keep_gradients sums what `combine` wants apart: set one of them")
        self.automatic_optimization = False
        self.recipe, self.objective, self.anchor, self.clip = recipe, objective, anchor, clip
        self.weights, self.subspace = weights, subspace
        self.schedule = StepSchedule(tasks_per_backward, keep=keep_gradients)
        self.teacher_budget = teacher_budget
        self.quantise, self.workspace, self.sharded = quantise, Path(workspace), sharded
        if sharded and (subspace or self._measures(recipe, initial)):
            raise ValueError(
                "model.sharded: preprocessors and presets that look at examples, and model.subspace, need "
                "the whole model on one device; leave them out, or run without it"
            )
        self.opened = recipe.open(self.workspace)
        self.initial, layout = initial, self.opened.layout
        names = tuple(recipe.experts)
        start = (
            initial(names, layout) if isinstance(initial, Preset) else read_initial(initial, names, layout)
        )
        self.coefficients = Coefficients(names, layout, start, constraint)
        self.start: Tensor = self.coefficients().detach().clone()  # a plain attribute: not in the checkpoint
        self.keep_better = keep_better
        self._combine = (combine,)  # in a tuple: no submodule, so that no checkpoint depends on it
        self.make_optimizer, self.make_scheduler = optimizer, lr_scheduler
        self._resident: Resident | None = None
        self.teachers: list[Record] = []  # K, where the objective asks for them
        self.description = "{}"  # what the run depends on, JSON: kept in its checkpoints

    @property
    def resident(self) -> Resident:
        """The merged model; loaded when a fit begins.

        Raises:
            RuntimeError: nothing was loaded yet.
        """
        if self._resident is None:
            raise RuntimeError("the model is loaded by Trainer.fit; call `load` to have it before")
        return self._resident

    @property
    def rule(self) -> torch.nn.Module | None:
        """How gradients of several experts become one; None is their sum."""
        return self._combine[0]

    @property
    def looks_at_data(self) -> bool:
        """Whether merging as it starts needs calibration examples already."""
        return self._measures(self.recipe, self.initial)

    @staticmethod
    def _measures(recipe: Recipe, initial: object) -> bool:
        informed = any(isinstance(method, Informed) for method in recipe.preprocess)
        return informed or isinstance(initial, MeasuredPreset)

    def check_data(self, data: Calibration) -> None:
        """Raise ValueError if the data are of other experts or in another order, or longer than the model."""
        if absent := [name for name in self.recipe.experts if name not in data.files]:
            raise ValueError(
                f"recipe.experts: {absent} have no `calibration` file of unlabeled examples to learn from"
            )
        if list(data.files) != list(self.recipe.experts):
            raise ValueError(f"data are of {list(data.files)}, the experts are {list(self.recipe.experts)}")
        config = self.opened.base.config
        limit = (config.get("text_config") or config).get("max_position_embeddings")
        for name, examples in zip(data.files, data.examples, strict=True):
            if limit and (longest := data.tokenize.longest(examples, limit)) > limit:
                raise ValueError(
                    f"{data.files[name]}: an example of {longest} tokens is over the model's limit of "
                    f"{limit} (max_position_embeddings): set data.max_length to {limit} or less"
                )

    def load(
        self,
        data: Calibration,
        device: torch.device | str = "cpu",
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Load the base, the heads and the preprocessed task vectors. Called by Lightning's `setup` too.

        Experts are recorded in the fit's own `precision`, where each then agrees with itself.

        Raises:
            ValueError: the data are of other experts, or of the same in another order.
        """
        self.check_data(data)
        if self._resident is not None:
            return
        self.opened.share_checksums()
        self._resident = load_resident(
            self.recipe,
            self.opened,
            self.coefficients,
            data.tokenize,
            self.workspace,
            device,
            None if self.weights == "stored" else torch.bfloat16,
            data.identity(),
            partial(ExpertStatistics, examples=data.examples, tokenizer=data.tokenize, folder=self.workspace),
            self.sharded,
            self.quantise,
        )
        self._resident.merged.keep_gradients = self.schedule.keep
        if self.schedule.recompute:
            recompute_blocks(self._resident.merged.module)
        if self.subspace:
            self._leave_alone_what_is_shared(data)
        if isinstance(self.initial, MeasuredPreset):
            self._start_at(self.initial, data)
        if self.objective.asks != Asks():
            with precision():
                self.teachers = self._record(data)

    def _leave_alone_what_is_shared(self, data: Calibration) -> None:
        merged = self.resident.merged
        identity = repr([self.opened.identity(), self.recipe.preprocess, data.identity()])
        merged.left_alone = shared_subspaces(merged.task_vectors, self.subspace, self.workspace, identity)

    def _start_at(self, preset: MeasuredPreset, data: Calibration) -> None:
        measure = ExpertStatistics(self.resident, data.examples, data.tokenize, self.workspace)
        values = preset.measured(tuple(self.recipe.experts), measure)
        self.start = values.expand_as(self.start).clone()
        self.coefficients.reset_(self.start)

    def _record(self, data: Calibration) -> list[Record]:
        heads = [expert.head.identity() if expert.head else "" for expert in self.recipe.experts.values()]
        depends_on = [
            self.opened.identity(),
            *heads,
            *data.identities().values(),
            data.tokenizer,
            data.max_length,
            self.weights,
            torch.is_autocast_enabled(self.resident.device.type),
        ]
        return record_teachers(
            self.resident,
            data.examples,
            data.tokenize,
            self.objective.asks,
            self.workspace,
            repr(depends_on),
            self.teacher_budget,
        )

    @override
    def setup(self, stage: str) -> None:
        """Load everything onto this process's device.

        Raises:
            TypeError: the trainer was given other data than a `Calibration`.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, Calibration):
            raise TypeError("fit with trainer.fit(module, datamodule=Calibration(...))")
        strategy = self.trainer.strategy  # `self.device` is still the CPU here
        self.load(data, strategy.root_device, strategy.precision_plugin.forward_context)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the run depends on beside its coefficients."""
        checkpoint["trainmerge"] = self.description

    @override
    def training_step(self, step: Step, index: int) -> None:
        """One optimizer step: all tasks' losses at one merge."""
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        reports: list[dict[str, Tensor]] = []

        def closure() -> Tensor:
            losses, gradient = self._gradient_of(step)
            reports.append(losses)
            optimizer.zero_grad()
            penalty = self.anchor(self.coefficients(), self.start.to(self.device))
            self.coefficients.backward(gradient)
            if self.anchor.weight:
                self.manual_backward(penalty)
            if self.clip:
                torch.nn.utils.clip_grad_norm_(self.coefficients.parameters(), self.clip)
            return torch.stack(list(reports[-1].values())).sum() + penalty.detach()

        optimizer.step(closure)
        self.coefficients.project_()
        self._step_scheduler()
        if isinstance(optimizer.optimizer, FrankWolfe):
            self.log("gap", optimizer.optimizer.gap())
        losses = reports[0]  # at the coefficients that the step began with
        self.log("loss", torch.stack(list(losses.values())).sum(), prog_bar=True)
        # Not loss/NAME: beside `loss`, a store that keeps metrics in files would need a folder of that name.
        self.log_dict({f"losses/{name}": loss for name, loss in losses.items()})

    def _gradient_of(self, step: Step) -> tuple[dict[str, Tensor], Tensor]:
        """Losses of all tasks at the merge of the present coefficients, and the gradient [K, G] of the step.

        Those of several processes are averaged first and combined second.
        """
        merged = self.resident.merged
        merged.materialise()
        losses: dict[str, Tensor] = {}
        with merged.tapped():
            if self.rule is None:
                for batches in rounds(step, self.schedule):
                    for name, loss in self._backward(batches).items():
                        losses[name] = losses[name] + loss if name in losses else loss
                return self._averaged(losses, merged.gradient())
            rows = []
            for batch in step:
                losses |= self._backward([batch])
                rows.append(merged.gradient())
        losses, gradients = self._averaged(losses, torch.stack(rows))
        return losses, combined(gradients, self.rule, self.global_step)

    def _backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Forwards of some tasks and one backward; the tasks' weighted losses."""
        names = list(self.recipe.experts)
        losses = {names[batch.expert]: self.loss(batch) for batch in batches}
        self.manual_backward(torch.stack(list(losses.values())).sum())
        return {name: loss.detach() for name, loss in losses.items()}

    def loss(self, batch: Batch) -> Tensor:
        """The weighted loss of one expert's batch at the weights that the resident model holds."""
        expert = list(self.recipe.experts.values())[batch.expert]
        if self.teachers:
            batch = batch._replace(teacher=self.teachers[batch.expert].of(batch.ids, self.resident.device))
        losses = self.objective(self.resident(batch, self.objective.asks.layers), batch)
        return expert.weight * batch.share * losses.mean()

    def _averaged(self, losses: dict[str, Tensor], gradient: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Means over processes: K losses and the K x G numbers (of each row), all that has to be reduced."""
        mine = torch.cat([torch.stack(list(losses.values())).to(gradient), gradient.flatten()])
        mean: Tensor = self.trainer.strategy.reduce(mine, reduce_op="mean")
        return dict(zip(losses, mean, strict=False)), mean[len(losses) :].view_as(gradient)

    def _step_scheduler(self) -> None:
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
            scheduler.step()

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer of the coefficients, and its schedule if there is one."""
        optimizer = self.make_optimizer(self.coefficients.parameters())
        if self.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.make_scheduler(optimizer)}}
