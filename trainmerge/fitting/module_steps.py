"""The steps of a fit of a module in memory: batches of all tasks, one optimizer step.

`fitting.steps` are the same steps within Lightning.

Legend: `K` experts, `G` coefficient groups.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trainmerge.coefficients.anchor import Anchor
from trainmerge.coefficients.concrete_rows import ConcreteRows
from trainmerge.data.batch import Batch
from trainmerge.fitting.foresight import foresight
from trainmerge.fitting.module_tasks import ModuleTasks, Stream
from trainmerge.fitting.optimisation import check_steps, optimisation_of
from trainmerge.fitting.rehearsal import rehearse_rule
from trainmerge.fitting.step_gradient import StepGradient
from trainmerge.plan.micro_batches import StepSchedule


class ModuleSteps:
    """Moves the coefficients of a merge in memory, a step at a time.

    Args:
        tasks: The merge and its losses.
        streams: The batches, one stream per expert.
        optimizer: Called with the coefficients.
        lr_scheduler: Called with the optimizer; None without a schedule.
        anchor: A penalty on the coefficients.
        combine: Aggregates the experts' gradients; None sums them.
        clip: Maximal norm of the gradient; 0 does not clip.

    Raises:
        ValueError: an optimizer, a schedule or a rule that could not take steps.
    """

    def __init__(
        self,
        tasks: ModuleTasks,
        streams: Sequence[Stream],
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None,
        anchor: Anchor,
        combine: nn.Module | None,
        clip: float,
    ) -> None:
        self.tasks, self.streams, self.anchor, self.clip = tasks, streams, anchor, clip
        self.combine, self.coefficients = combine, tasks.merged.coefficients
        self.start = self.coefficients().detach().clone()  # [K, G]
        check_steps(optimisation_of(self.coefficients, optimizer, lr_scheduler))
        if combine is not None:
            rehearse_rule(combine, self.coefficients.raw.detach(), prefix="")
        self.optimizer = optimizer(self.coefficients.parameters())
        ConcreteRows.follow(self.optimizer, self.coefficients)
        self.scheduler = lr_scheduler(self.optimizer) if lr_scheduler else None

    def step(self, number: int) -> Mapping[str, float]:
        """One optimizer step; the tasks' weighted losses at its start.

        Raises:
            ValueError: a loss is not finite.
        """
        taken = [stream.take() for stream in self.streams]
        signals = [self.tasks.signals(k, *batch) for k, batch in enumerate(taken)]
        names = [stream.name for stream in self.streams]
        loss = self.tasks.losses([batch for batch, _ in taken], signals)
        moved = self.optimizer, self.anchor, self.start, self.clip
        ahead = self.tasks.merged.writes_ahead
        predict = foresight(self.coefficients, *moved) if ahead else None
        how = torch.Tensor.backward, _alone, StepSchedule(), self.combine, predict
        gradient = StepGradient(self.tasks.merged, names, loss, *how)
        turns = [Batch(k, {}, torch.ones(0, 0), torch.arange(0)) for k in range(len(names))]
        found: list[dict[str, float]] = []
        masks = self.tasks.merged.masks

        def closure() -> Tensor:
            if masks is not None:
                masks.clear()
            losses, slopes = gradient(turns, number)
            found.append({name: float(value) for name, value in losses.items()})
            self.optimizer.zero_grad()
            penalty = gradient.assign(slopes, self.anchor, self.start, self.clip)
            return torch.stack(list(losses.values())).sum() + penalty

        self.optimizer.step(closure)  # type: ignore[arg-type]
        self.coefficients.project_()
        self.tasks.merged.settle()
        if masks is not None:
            masks.step()
        if self.scheduler:
            self.scheduler.step()
        _check_finite(number, found[0])
        return found[0]


def _alone(tensor: Tensor) -> Tensor:
    """The mean over one process."""
    return tensor


def _check_finite(step: int, losses: Mapping[str, float]) -> None:
    bad = {name: loss for name, loss in losses.items() if not abs(loss) < float("inf")}
    if bad:
        raise ValueError(
            f"step {step}: the losses of {bad} are not finite: check the batches, or lower the learning rate"
        )
