"""What optimizers of one tensor of coefficients share."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class SingleTensorOptimizer(Optimizer):
    """Optimises the coefficients [K, G] and nothing else.

    Raises:
        ValueError: more or fewer parameters than one.
    """

    def __init__(self, params: Iterable[Tensor] | Iterable[dict[str, Any]], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        if len(self.param_groups) != 1 or len(self.param_groups[0]["params"]) != 1:
            raise ValueError(f"{type(self).__name__} optimises a single tensor of coefficients")

    @property
    def coefficients(self) -> Tensor:
        """The tensor, [K, G]."""
        parameter: Tensor = self.param_groups[0]["params"][0]
        return parameter
