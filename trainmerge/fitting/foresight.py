"""The coefficients that an optimizer step will give, computed before it on a copy.

Legend: `K` experts, `G` coefficient groups.
"""

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, optim
from torch.optim import Optimizer

from trainmerge.coefficients.anchor import Anchor
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.model.exact import exact

ELEMENTWISE = (  # a coefficient's step depends on its own gradients only
    optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax, optim.Adadelta, optim.Adagrad,
    optim.RMSprop, optim.Rprop, optim.ASGD,
)  # fmt: skip


@dataclass(frozen=True)
class Foresight:
    """Predicts the step of an elementwise optimizer, from a gradient that is complete in some columns.

    It runs within a backward, whose order another one in its thread would change: so no backward is run.

    Args:
        coefficients: What the optimizer moves.
        optimizer: The optimizer.
        free: 1 where a coefficient is its raw value, 0 where it is fixed, [K, G].
        pull: The gradient of the penalty on the coefficients, [K, G]; None without one.
    """

    coefficients: Coefficients
    optimizer: Optimizer
    free: Tensor
    pull: Tensor | None

    @torch.no_grad()
    def __call__(self, gradient: Tensor) -> Tensor:
        """The coefficients after the step, given d loss / d coefficients, both [K, G]: those columns' own."""
        layout = self.coefficients.layout  # never changed, and large
        trial, optimizer = deepcopy((self.coefficients, self.optimizer), {id(layout): layout})
        with exact(trial.raw):
            slope = gradient.to(trial.raw) * self.free
            trial.raw.grad = slope if self.pull is None else slope + self.pull
            optimizer.step()
        trial.project_()
        found: Tensor = trial().detach()
        return found


def foresight(
    coefficients: Coefficients, optimizer: Optimizer, anchor: Anchor, start: Tensor, clip: float
) -> Foresight | None:
    """A prediction of this optimizer's next step.

    None if that of one column depends on others, or if coefficients are a function of the raw values
    (`Sigmoid`), whose slope needs a backward.
    """
    if type(optimizer) not in ELEMENTWISE or clip:
        return None
    free = coefficients.slope(torch.ones_like(coefficients.raw))
    if bool(((free != 0) & (free != 1)).any()):
        return None
    penalty = anchor(coefficients(), start)
    pull = torch.autograd.grad(penalty, coefficients.raw)[0] if anchor.weight else None
    return Foresight(coefficients, optimizer, free, pull)
