"""Concrete subspace masks: one learned number in (0, 1) per merged weight, shared by all experts.

Tang et al., arXiv 2312.06173. With logits x, uniform u and a temperature T, a sampled mask is
m = sigmoid((x + logit u) / T), and a parameter's merge is W = base + m' * sum_k c_k tau_k with
m' = m / mean(m). The paper learns masks and coefficients in two nested loops; here both gradients come from
one weight gradient G in closed form. With d = G * sum_k c_k tau_k,

    dL/dc_k = <m' * G, tau_k>,    dL/dx = (d - mean(d m')) / mean(m) * m (1 - m) / T

so they are learned together. Twelve bytes per merged weight: logits and Adam's two moments.

Legend: `K` experts, `C` chunks of one parameter, `*S` its shape.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trainmerge.kernels import accumulation_dtype
from trainmerge.system.ranges import check_fields
from trainmerge.task_vectors.delta import Delta


@dataclass(frozen=True)
class Concrete:
    """Settings of the masks of `fit_module`.

    Args:
        temperature: T; smaller masks are nearer to 0 and 1.
        lr: Adam's rate for the logits. A logit moves by about this much per step, so a mask needs thousands
            of steps at the paper's 1e-3.
        seed: Of the samples.
    """

    temperature: float = 0.5
    lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, temperature="(0, inf)", lr="(0, inf)", seed="[0, inf)")


class ConcreteMasks:
    """The masks of all merged parameters: sampled while they are learned, then settled.

    A sample is a function of seed, step and parameter, so it is drawn again instead of stored.
    """

    def __init__(self, settings: Concrete, shapes: Mapping[str, torch.Size], device: torch.device) -> None:
        self.settings, self.number, self.is_settled = settings, 0, False
        self.logits = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
        self._order = {name: place for place, name in enumerate(shapes)}
        self._optimizer = torch.optim.Adam(self.logits.values(), lr=settings.lr)

    def sample(self, name: str) -> Tensor:
        """m of this step, [*S] float32."""
        logits = self.logits[name]
        generator = torch.Generator(logits.device)
        generator.manual_seed((self.settings.seed * 1_000_003 + self.number) * 100_003 + self._order[name])
        uniform = torch.rand(logits.shape, generator=generator, device=logits.device)
        noise = uniform.clamp(1e-6, 1 - 1e-6).logit()
        return ((logits + noise) / self.settings.temperature).sigmoid()

    def kept(self, name: str) -> Tensor:
        """The mean mask sigmoid(x / T) cut at 1/2, [*S] bool; weights that nothing moved are kept."""
        return self.logits[name] >= 0

    def mask_all(self, parameters: Mapping[str, Tensor], deltas: Mapping[str, Delta]) -> None:
        """Mask merged parameters in place."""
        for name, parameter in parameters.items():
            self.mask_(name, parameter.data, deltas[name].base)

    def mask_(self, name: str, weight: Tensor, base: Tensor) -> None:
        """Mask the change of a merged weight in place: base + m' (weight - base)."""
        mask = self.kept(name).float() if self.is_settled else self.sample(name)
        scaled = mask / mask.mean().clamp(min=1e-12)
        start = base.to(scaled)  # float32, on the device of the mask
        weight.copy_(start + scaled * (weight.to(scaled) - start))

    def collect(self, name: str, slope: Tensor, change: Tensor) -> Tensor:
        """Add a weight gradient's part to the logits' gradient; returns m' G, the coefficients' part.

        Args:
            name: The parameter.
            slope: G, [*S].
            change: sum_k c_k tau_k, [*S] float32, before the mask.
        """
        mask = self.sample(name)
        mean = mask.mean()
        scaled, slope = mask / mean, slope.to(mask)
        moved = slope * change.to(mask)
        found = (moved - (moved * scaled).mean()) / mean * mask * (1 - mask) / self.settings.temperature
        logits = self.logits[name]
        logits.grad = found if logits.grad is None else logits.grad + found
        return slope * scaled

    def clear(self) -> None:
        """Forget the gradients."""
        self._optimizer.zero_grad()

    def step(self) -> None:
        """One step of the logits; the next sample is another."""
        self._optimizer.step()
        self.clear()
        self.number += 1

    def settle(self) -> None:
        """From now on the masks are those that are kept, not samples."""
        self.is_settled = True


def change_of(delta: Delta, coefficients: Tensor) -> Tensor:
    """sum_k c_k tau_k of one parameter, [*S] float32 or wider; coefficients [K, C]."""
    out = torch.empty(delta.shape, dtype=accumulation_dtype(delta.base.dtype))
    delta.merge(out, coefficients)
    return out.sub_(delta.base)
