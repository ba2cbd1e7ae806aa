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
from trainmerge.fitting.step_gradient import assign
from trainmerge.model.exact import exact

ELEMENTWISE = (  # a coefficient's step depends on its own gradients only
    optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax, optim.Adadelta, optim.Adagrad,
    optim.RMSprop, optim.Rprop, optim.ASGD,
)  # fmt: skip


@dataclass(frozen=True)
class Foresight:
    """Predicts the step of an elementwise optimizer, from a gradient that is complete in some columns.

    Args:
        coefficients: What the optimizer moves.
        optimizer: The optimizer.
        anchor: The penalty on the coefficients.
        start: What it holds them at, [K, G].
    """

    coefficients: Coefficients
    optimizer: Optimizer
    anchor: Anchor
    start: Tensor

    def __call__(self, gradient: Tensor) -> Tensor:
        """The coefficients after the step, given d loss / d coefficients, both [K, G]: those columns' own."""
        layout = self.coefficients.layout  # never changed, and large
        trial, optimizer = deepcopy((self.coefficients, self.optimizer), {id(layout): layout})
        with torch.enable_grad(), exact(trial.raw):
            assign(trial, trial.slope(gradient), self.anchor, self.start)
            optimizer.step()
        trial.project_()
        return trial().detach()


def foresight(
    coefficients: Coefficients, optimizer: Optimizer, anchor: Anchor, start: Tensor, clip: float
) -> Foresight | None:
    """A prediction of this optimizer's steps; None if a step of one column depends on others."""
    plain = type(optimizer) in ELEMENTWISE and not clip
    return Foresight(coefficients, optimizer, anchor, start) if plain else None
