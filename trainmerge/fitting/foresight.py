"""The coefficients that an optimizer step will give, computed before it on a copy.

Legend: `K` experts, `G` coefficient groups.
"""

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, optim
from torch.autograd import forward_ad
from torch.func import functional_call
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
        pull: The gradient of the penalty on the coefficients, [K, G]; None without one.
    """

    coefficients: Coefficients
    optimizer: Optimizer
    pull: Tensor | None

    @torch.no_grad()
    def __call__(self, gradient: Tensor) -> Tensor:
        """The coefficients after the step, given d loss / d coefficients, both [K, G]: those columns' own."""
        layout = self.coefficients.layout  # never changed, and large
        trial, optimizer = deepcopy((self.coefficients, self.optimizer), {id(layout): layout})
        with exact(trial.raw):
            slope = self._slope(gradient.to(trial.raw))
            trial.raw.grad = slope if self.pull is None else slope + self.pull
            optimizer.step()
        trial.project_()
        found: Tensor = trial().detach()
        return found

    def _slope(self, gradient: Tensor) -> Tensor:
        """d loss / d raw, as `Coefficients.slope` if each coefficient depends on its own raw value only."""
        with forward_ad.dual_level():
            raw = forward_ad.make_dual(self.coefficients.raw.detach(), gradient)  # type: ignore[no-untyped-call]
            moved = functional_call(self.coefficients, {"raw": raw})
            found: Tensor = forward_ad.unpack_dual(moved).tangent  # type: ignore[no-untyped-call]
            return found


def foresight(
    coefficients: Coefficients, optimizer: Optimizer, anchor: Anchor, start: Tensor, clip: float
) -> Foresight | None:
    """A prediction of this optimizer's next step; None if that of one column depends on others."""
    if type(optimizer) not in ELEMENTWISE or clip:
        return None
    penalty = anchor(coefficients(), start)
    pull = torch.autograd.grad(penalty, coefficients.raw)[0] if anchor.weight else None
    return Foresight(coefficients, optimizer, pull)
