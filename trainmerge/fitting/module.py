"""The LightningModule: materialise the merge, one forward and backward per task, one optimizer step.

Its checkpoint contains only coefficients and optimizer state, some kilobytes. The model and the task vectors
are hidden from Lightning, which would otherwise save, move and synchronise them.

Legend: `K` experts, `G` coefficient groups.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from typing_extensions import override

from trainmerge.coefficients.anchor import Anchor
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.constraints import Constraint, Free
from trainmerge.coefficients.initial import Initial, read_initial
from trainmerge.data.batch import Batch, Step
from trainmerge.data.calibration import Calibration
from trainmerge.fitting.loaded import Loaded, load_fit
from trainmerge.fitting.model_settings import (
    ModelSettings,
    check_data,
    check_given,
    check_module_settings,
    warn_of_densities,
)
from trainmerge.fitting.on_policy import OnPolicy
from trainmerge.fitting.prepare import FitInputs
from trainmerge.fitting.steps import CoefficientSteps
from trainmerge.model.residency import Room, Vectors
from trainmerge.model.resident import Resident
from trainmerge.model.teachers import BUDGET
from trainmerge.objectives import Entropy, Objective
from trainmerge.plan.micro_batches import OpenSchedule
from trainmerge.run.recipe import Recipe
from trainmerge.task_vectors.quantise import Quantise


class MergeModule(CoefficientSteps):
    """Learns a merge's coefficients from unlabeled data.

    Args:
        recipe: The merge: base, experts, preprocessing and grouping.
        objective: The loss of a batch; the tasks' losses are weighted by `Expert.weight` and summed.
        constraint: The set that coefficients stay in.
        initial: Their start: one number, one per expert, a `coefficients.safetensors`, or a preset.
        anchor: A penalty on the distance of the coefficients from their start, or from given values.
        optimizer: Called with the coefficients, as in any LightningModule. One that evaluates its closure
            several times per step (L-BFGS) gets the same batches each time.
        lr_scheduler: Stepped once per optimizer step.
        keep_better: After the fit, compare the loss over all calibration examples at start and end, and save
            the coefficients with the lower one.
        combine: Aggregates the experts' coefficient gradients: a `torchjd.aggregation` rule, or any module
            [m, n] -> [n]; every expert then has its own backward. By default they are summed. Rules see the
            gradients of what the optimizer moves: under `Sigmoid` those of the logits, not of the
            coefficients.
        subspace: Project weight gradients onto the orthogonal complement of the experts' shared subspace, of
            dimension floor(min(rows, columns) / subspace), as DOGE does; 0 projects nothing.
        clip: Maximal norm of the gradient over all coefficients; 0 does not clip. The gradient is that of the
            sum over tasks: code that averages K tasks clips at `clip` / K.
        weights: Dtype of the resident model: `stored` is the base files' own; `bfloat16` halves a float32
            model, and the merge is rounded to it once. Coefficients and reductions are always float32.
        schedule: `auto` chooses the next two, where they are not set, for the fewest passes over the task
            vectors within a known memory: a GPU's, or `memory` of a fit on a CPU. `least` memory is 1 and
            false, as is `auto` where no memory is known.
        tasks_per_backward: Tasks whose forwards share one backward. Each backward reads the task vectors once
            and needs the memory of these tasks' activations.
        keep_gradients: Accumulate the weight gradients over a step's backwards and read the task vectors once
            per step, for the memory of one more model.
        vectors: Where base and task vectors are held: on the `device` or in `host` memory from the first step
            on, or nowhere but in their `file`s. `auto` fills a GPU, then host memory, as far as the plan of a
            step leaves room, and reads files on a CPU. Coefficients do not depend on this.
        teacher_budget: Bytes for the experts' recorded probabilities: all if they fit, else the largest per
            row.
        quantise: Learn on quantised task vectors, `Int8` or `Ternary`; the export uses the exact ones.
        workspace: Folder for preprocessed task vectors, merged adapters and recorded expert outputs.
        on_policy: Learn from continuations that the merge writes, in rounds; by default from the examples.
        sharded: Shard the model over the trainer's processes instead of replicating it: for models that do
            not fit on one device. The trainer's strategy stays `ddp`; coefficients do not depend on this.
        shard_over: The processes that share one model: `all`, or those of a `machine`, which then exchanges
            only the coefficients' gradient with other machines.
        gathered_ahead: Blocks of a sharded model that are gathered ahead of the one that runs. Each takes a
            block's memory; coefficients do not depend on this.
    """

    def __init__(
        self,
        recipe: Recipe,
        objective: Objective = Entropy(),  # noqa: B008 - frozen
        constraint: Constraint = Free(),  # noqa: B008 - frozen
        initial: Initial = 0.3,
        anchor: Anchor = Anchor(),  # noqa: B008 - frozen
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
        keep_better: bool = False,
        combine: torch.nn.Module | None = None,
        subspace: int = 0,
        clip: float = 0.0,
        weights: Literal["stored", "bfloat16"] = "stored",
        schedule: Literal["auto", "least"] = "auto",
        tasks_per_backward: int | None = None,
        keep_gradients: bool | None = None,
        teacher_budget: int = BUDGET,
        quantise: Quantise | None = None,
        workspace: str = "workspace",
        sharded: bool = False,
        on_policy: OnPolicy | None = None,
        vectors: Vectors = "auto",
        shard_over: Literal["all", "machine"] = "all",
        gathered_ahead: int = 1,
    ) -> None:
        super().__init__()
        check_given(objective=objective, constraint=constraint, anchor=anchor, optimizer=optimizer)
        self.recipe, self.objective, self.anchor, self.clip = recipe, objective, anchor, clip
        place = Path(workspace), sharded, vectors, shard_over, gathered_ahead
        self.settings = ModelSettings(weights, subspace, quantise, teacher_budget, *place)
        self.asked = OpenSchedule.of(schedule, tasks_per_backward, keep_gradients, combine is not None)
        self.schedule = self.asked.least
        self.room: Room | None = None  # for task vectors, once a plan has found it
        self.initial, self.keep_better, self.on_policy = initial, keep_better, on_policy
        check_module_settings(self.settings, recipe, initial, clip, keep_better)
        self.opened = recipe.open(self.settings.workspace)
        names, layout = tuple(recipe.experts), self.opened.layout
        self.coefficients = Coefficients(names, layout, read_initial(initial, names, layout), constraint)
        warn_of_densities(recipe, initial)
        self.start: Tensor = self.coefficients().detach().clone()  # a plain attribute: not in the checkpoint
        self._combine = (combine,)  # in a tuple: no submodule, so that no checkpoint depends on it
        self.make_optimizer, self.make_scheduler = optimizer, lr_scheduler
        self._loaded: Loaded | None = None  # once a fit begins
        self.description = "{}"  # what the run depends on, as JSON: saved in its checkpoints

    @property
    def loaded(self) -> Loaded:
        """The merged model and the experts' records; loaded when a fit begins.

        Raises:
            RuntimeError: the model is not loaded yet.
        """
        if self._loaded is None:
            raise RuntimeError(
                "the model is not loaded yet: Trainer.fit loads it; call `load` to load it earlier"
            )
        return self._loaded

    @property
    @override
    def resident(self) -> Resident:
        """The merged model. Raises RuntimeError as `loaded`."""
        return self.loaded.resident

    @property
    @override
    def rule(self) -> torch.nn.Module | None:
        """The aggregation of the experts' gradients; None is their sum."""
        return self._combine[0]

    @override
    def load(
        self,
        data: Calibration,
        device: torch.device | str = "cpu",
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Prepare the model (`prepare`), once; raises as `check_data`. Lightning's `setup` calls it too."""
        check_data(self.recipe, self.opened, data, self.settings.sharded)
        if self._loaded is not None:
            return
        self._loaded = load_fit(self.inputs(data), self.on_policy, self.description, device, precision)
        if self._loaded.start is not None:
            self.start = self._loaded.start.expand_as(self.start).clone()
            self.coefficients.reset_(self.start)

    def inputs(self, data: Calibration) -> FitInputs:
        """What `prepare` makes the model from."""
        merge = self.recipe, self.opened, self.coefficients, self.initial
        where = self.settings, self.schedule, self.room, self.machine
        return FitInputs(*merge, self.objective.asks, data, *where)

    @override
    def training_step(self, step: Step, index: int) -> None:
        """One optimizer step; on policy, on the round's texts of the step's examples."""
        super().training_step(self.loaded.rewritten(step, self.global_step), index)

    @override
    def loss(self, batch: Batch) -> Tensor:
        """The weighted loss of one expert's batch at the resident model's current weights.

        Its backward has the model's `loss_scale`, which `MergedModel.gradient` takes out again.
        """
        expert = list(self.recipe.experts.values())[batch.expert]
        return self.resident.merged.loss_scale(expert.weight * batch.share * self.losses(batch).mean())

    def losses(self, batch: Batch) -> Tensor:
        """The loss of each example of one expert's batch, [B], without the expert's weight."""
        batch = self.loaded.with_teacher(self.resident.counted(batch))
        return self.objective(self.resident(batch, self.objective.asks.layers), batch)
