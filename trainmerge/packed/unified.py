"""One difference for all tasks, one bit per weight for each: TALL masks and EMR-Merging.

TALL masks (Wang et al., arXiv 2405.07813) keep task t's entries of a merged difference u where
|tau_t| > lambda |u - tau_t|. EMR-Merging (Huang et al., arXiv 2405.17461) elects a sign per entry, takes the
largest magnitude among the tasks that agree, and masks the others. Both papers scale a task by one number, 1
and sum |tau_t| / sum |m_t u|. Here each tensor and task has the scale of least squares,
a = <m_t u, tau_t> / ||m_t u||^2, whose error is never larger.

Legend: `K` tasks, `R` rows, `W` entries of a row.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.packed.bits import pack_bits
from trainmerge.packed.codec import Codec, EncodedParameter, errors
from trainmerge.packed.parameter import Parameter
from trainmerge.system.ranges import check_fields

ROUNDS = 2  # further turns of masks and scales
Keep = Callable[[Tensor, Tensor], Tensor]  # u [r, W] and tau [K, r, W] -> bool [K, r, W]


@dataclass(frozen=True)
class Mask(Codec):
    """TALL masks over the run's merge; over the sum of all tasks where the run merges nothing.

    Args:
        threshold: lambda. 1 keeps exactly the entries whose squared error falls; mask and scale are then
            found in turns, each of which lowers the error: from the paper's mask, and from the whole u, so
            that the size of u does not matter. The paper takes 0.2 to 0.6, chosen by labels, and masks u as
            it is.
    """

    threshold: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "mask", threshold="[0, inf)")

    @property
    @override
    def name(self) -> str:
        return "mask"

    @override
    def encode(self, parameter: Parameter) -> EncodedParameter:
        unified = parameter.merged().to(self.dtype)
        plain = _masked(parameter, unified, self._kept(torch.ones(parameter.tasks)))
        if self.threshold != 1:
            return plain
        one, other = (
            self._in_turns(parameter, unified, made) for made in (plain, _whole(parameter, unified))
        )
        return _better(parameter, one, other)

    def _in_turns(self, parameter: Parameter, unified: Tensor, made: EncodedParameter) -> EncodedParameter:
        """Masks and scales in turns, from these scales on; each turn lowers the error."""
        for _ in range(ROUNDS):
            made = _masked(parameter, unified, self._kept(torch.where(made.scales > 0, made.scales, 1)))
        return made

    def _kept(self, scales: Tensor) -> Keep:
        """Where the scaled difference is near enough, for scales [K]."""
        a = scales[:, None, None]
        return lambda u, taus: taus.abs() > self.threshold * (a * u - taus).abs()


@dataclass(frozen=True)
class Emr(Codec):
    """EMR-Merging's elected difference; the run's coefficients have no part in it."""

    @property
    @override
    def name(self) -> str:
        return "emr"

    @override
    def encode(self, parameter: Parameter) -> EncodedParameter:
        unified = torch.empty(parameter.shape, dtype=self.dtype)
        for part, taus in parameter.blocks():
            unified[part] = elect(taus)
        return _masked(parameter, unified, lambda u, taus: taus * u > 0)


@dataclass(frozen=True)
class Shared(Codec):
    """The run's merge without masks, for budgets of about one model."""

    @property
    @override
    def name(self) -> str:
        return "shared"

    @override
    def encode(self, parameter: Parameter) -> EncodedParameter:
        unified = parameter.merged().to(self.dtype)
        made = _whole(parameter, unified)
        return made._replace(own=tuple({} for _ in made.own))


def elect(taus: Tensor) -> Tensor:
    """EMR's unified difference [r, W] of [K, r, W]: the sum's sign, the largest magnitude that agrees.

    Where the sum is 0 there is no sign, and the difference is 0.
    """
    sign = taus.sum(dim=0).sign()
    return sign * (taus * sign).clamp(min=0).amax(dim=0)


def _whole(parameter: Parameter, unified: Tensor) -> EncodedParameter:
    """All entries of u, at each task's scale of least squares."""
    return _masked(parameter, unified, lambda _, taus: torch.ones_like(taus, dtype=torch.bool))


def _better(parameter: Parameter, one: EncodedParameter, other: EncodedParameter) -> EncodedParameter:
    """Of every task the encoding with the smaller error; both have the same u."""
    first = (errors(parameter, one) <= errors(parameter, other)).tolist()
    own = tuple(a if here else b for a, b, here in zip(one.own, other.own, first, strict=True))
    return one._replace(own=own, scales=torch.where(torch.tensor(first), one.scales, other.scales))


def _masked(parameter: Parameter, unified: Tensor, keep: Keep) -> EncodedParameter:
    """u [R, W] in its dtype, every task's mask, and the scales of least squares for u as it is stored."""
    products, squares = torch.zeros(2, parameter.tasks, dtype=torch.float64)
    bits: list[list[Tensor]] = [[] for _ in range(parameter.tasks)]
    for u, taus, kept in _kept(parameter, unified, keep):
        some = torch.where(kept, u, 0).double()
        products += (some * taus).sum(dim=(1, 2))
        squares += some.square().sum(dim=(1, 2))
        for own, mask in zip(bits, kept, strict=True):
            own.append(pack_bits(mask))
    scales = torch.where(squares > 0, products / squares, 0).float()
    masks = ({"m": torch.cat(parts)} if scale else {} for parts, scale in zip(bits, scales, strict=True))
    return EncodedParameter({"u": unified}, tuple(masks), scales)


def _kept(parameter: Parameter, unified: Tensor, keep: Keep) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for part, taus in parameter.blocks():
        u = unified[part].to(taus.dtype)
        yield u, taus, keep(u, taus)
