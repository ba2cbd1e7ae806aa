"""The gradient of one step: forwards and backwards of all tasks at one merge, and their aggregation.

Legend: `K` experts, `G` coefficient groups.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from trainmerge.coefficients.aggregation import aggregate_gradients
from trainmerge.coefficients.anchor import Anchor
from trainmerge.data.batch import Batch, Step
from trainmerge.model.merged_model import MergedModel
from trainmerge.model.one_pass import Predict
from trainmerge.plan.micro_batches import StepSchedule, rounds


@dataclass(frozen=True)
class StepGradient:
    """Computes the losses of all tasks and the gradient of the coefficients' optimised values.

    Args:
        merged: The merged model.
        names: The experts' names, K.
        loss: The weighted loss of one expert's batch, with the model's `loss_scale`.
        backward: The backward of a loss.
        mean: The mean of a tensor over processes.
        schedule: How a step is split into backwards.
        rule: Aggregates the experts' gradients; None sums them.
        predict: The coefficients to come, from the gradient; None where that is not possible.
    """

    merged: MergedModel
    names: Sequence[str]
    loss: Callable[[Batch], Tensor]
    backward: Callable[[Tensor], None]
    mean: Callable[[Tensor], Tensor]
    schedule: StepSchedule
    rule: nn.Module | None
    predict: Predict | None = None

    def __call__(self, step: Step, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        """The K losses at the current coefficients, and d loss / d raw [K, G]; `seed` is the rule's.

        Rows of experts are combined as gradients of `raw`, which is what the optimizer moves.
        """
        losses, rows = self._means(step, merge=True)
        # An overflow is computed again with a smaller scale; a loss that is not finite is no overflow.
        while not self.merged.loss_scale.settle(_finite(rows) or not _finite(*losses.values())):
            losses, rows = self._means(step)
        slopes = torch.stack([self.merged.coefficients.slope(row) for row in rows])
        return losses, slopes[0] if self.rule is None else aggregate_gradients(slopes, self.rule, seed)

    def assign(self, slopes: Tensor, anchor: Anchor, start: Tensor, clip: float) -> Tensor:
        """Give the coefficients the gradient `slopes` [K, G] and the anchor's, clipped; returns its penalty.

        `start` [K, G] is what the anchor holds them at; `clip` is the maximal norm, 0 for none.
        """
        coefficients = self.merged.coefficients
        coefficients.raw.grad = slopes
        penalty = anchor(coefficients(), start)
        if anchor.weight:
            self.backward(penalty)
        if clip:
            nn.utils.clip_grad_norm_(coefficients.parameters(), clip)
        return penalty.detach()

    def _means(self, step: Step, merge: bool = False) -> tuple[dict[str, Tensor], Tensor]:
        """Means over processes of the losses and of the rows [m, K, G]: all that is reduced.

        `merge`: the first forwards write the merge, which is there otherwise.
        """
        losses, rows = self._rows(step, merge)
        mine = torch.cat([torch.stack(list(losses.values())).to(rows), rows.flatten()])
        mean = self.mean(mine)
        return dict(zip(losses, mean, strict=False)), mean[len(losses) :].view_as(rows)

    def _rows(self, step: Step, merge: bool) -> tuple[dict[str, Tensor], Tensor]:
        """Losses of this process, and one gradient per expert with a rule, else their sum: [m, K, G]."""
        losses: dict[str, Tensor] = {}
        rows = []
        with self.merged.tapped():
            if self.rule is None:
                *parts, last = rounds(step, self.schedule)
                for i, batches in enumerate([*parts, last]):
                    own = self._backward(batches, merge and i == 0, batches is last)
                    for name, loss in own.items():
                        losses[name] = losses[name] + loss if name in losses else loss
                return losses, self.merged.gradient()[None]
            for i, batch in enumerate(step):
                losses |= self._backward([batch], merge and i == 0)
                rows.append(self.merged.gradient())
        return losses, torch.stack(rows)

    def _backward(self, batches: Sequence[Batch], merge: bool, last: bool = False) -> dict[str, Tensor]:
        """Forwards of some tasks and one backward; the tasks' weighted losses."""
        losses = self.merged.run([partial(self.loss, batch) for batch in batches], merge)
        with self.merged.last_backward(self.predict) if last else nullcontext():
            self.backward(torch.stack(losses).sum())
        names = (self.names[batch.expert] for batch in batches)
        return dict(zip(names, (loss.detach() for loss in losses), strict=True))


def _finite(*tensors: Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
