"""Scale of the loss where gradients are float16: without it, gradients below 6e-8 become 0.

As in mixed-precision training (Micikevicius et al., ICLR 2018), losses are multiplied by a power of two
before the backward and the gradient is divided by it; here the coefficients' gradient, which is float32 or
wider. A gradient that overflows is computed again with a smaller scale, so that no step is lost.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override


class _Scaled(torch.autograd.Function):
    """The identity; its backward multiplies the gradient by the scale."""

    @staticmethod
    @override
    def forward(ctx: Any, loss: Tensor, scale: "LossScale") -> Tensor:
        ctx.scale = scale
        return loss.view_as(loss)

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.scale.used = ctx.scale.value
        return gradients[0] * ctx.scale.value, None


class LossScale:
    """A scale that halves when a gradient overflows, and doubles after many that do not.

    Args:
        value: The scale; 1 scales nothing, and never changes.
        growth: Its factor after `interval` finite gradients in a row.
        backoff: Its factor after a gradient that overflowed.
        interval: See `growth`.
    """

    def __init__(
        self, value: float = 1.0, growth: float = 2.0, backoff: float = 0.5, interval: int = 2000
    ) -> None:
        self.value, self.growth, self.backoff, self.interval = value, growth, backoff, interval
        self.active = value != 1.0
        self.finite = 0  # finite gradients since the scale changed
        self.used = 1.0  # the scale of the backwards since the last `unscaled`

    @staticmethod
    def of(module: nn.Module) -> "LossScale":
        """The scale that a module's dtypes need: 2^16 where a parameter is float16, else none."""
        narrow = any(parameter.dtype == torch.float16 for parameter in module.parameters())
        return LossScale(2.0**16) if narrow else LossScale()

    @staticmethod
    def like(scaler: torch.amp.GradScaler) -> "LossScale":
        """The start and the factors of torch's scaler."""
        if not scaler.is_enabled():
            return LossScale()
        factors = scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()
        return LossScale(scaler.get_scale(), *factors)

    def __call__(self, loss: Tensor) -> Tensor:
        """The same loss, whose backward gives gradients times the scale."""
        scaled: Tensor = _Scaled.apply(loss, self) if self.active else loss  # type: ignore[no-untyped-call]
        return scaled

    def unscaled(self, gradient: Tensor) -> Tensor:
        """The gradient of the backwards since the last call, without the scale."""
        used, self.used = self.used, 1.0
        return gradient if used == 1.0 else gradient / used

    def settle(self, finite: bool) -> bool:
        """Adapt the scale to a gradient; False if it overflowed and should be computed again."""
        if not self.active:
            return True
        if not finite:
            self.finite = 0
            lowest = self.value <= 1.0  # not an overflow, then
            self.value = max(1.0, self.value * self.backoff)
            return lowest
        self.finite += 1
        if self.finite == self.interval:
            self.value, self.finite = self.value * self.growth, 0
        return True

    def state_dict(self) -> dict[str, float]:
        """What a resumed fit needs to continue with the same scale."""
        return {"value": self.value, "finite": self.finite}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue with the scale of `state`."""
        self.value, self.finite = float(state["value"]), int(state["finite"])


def scaled_gradients(loss: Tensor, weights: Sequence[Tensor], scale: LossScale) -> list[Tensor | None]:
    """A loss's gradients: in float32 where weights are float16, from a scaled backward that fits it."""
    while True:
        factor = scale.value
        found = torch.autograd.grad(loss * factor, weights, allow_unused=True, retain_graph=scale.active)
        if not scale.active:
            return list(found)
        finite = all(bool(slope.isfinite().all()) for slope in found if slope is not None)
        if scale.settle(finite or not bool(loss.isfinite())):
            return [None if slope is None else slope.float() / factor for slope in found]
