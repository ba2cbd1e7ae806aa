"""What every codec does: the differences of K tasks -> tensors that are smaller, and back.

Parts of a parameter, in the notation of the file. Shared by all tasks: `u` a unified difference [R, W], `s`
another one that is added whole, `b` basis vectors [p + 1, R, W]. Of one task: `m` a mask of bits, `t` signs
of base 3, `U` [R, r] and `V` [r, W] factors, `z` [p + 1] coordinates, `d` the difference itself. A scale `a`
per task multiplies `u` and `t`; where it is 0 the task does not change the parameter.

Legend: `K` tasks, `R` rows, `W` entries of a row, `r` rank, `p` basis vectors.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trainmerge.packed.bits import unpack_bits, unpack_trits
from trainmerge.packed.parameter import Parameter


class EncodedParameter(NamedTuple):
    """One parameter's parts."""

    shared: Mapping[str, Tensor]
    own: tuple[Mapping[str, Tensor], ...]  # of each task
    scales: Tensor  # [K] float32

    @property
    def parts(self) -> list[Tensor]:
        """All of them, scales last."""
        return [*self.shared.values(), *(part for own in self.own for part in own.values()), self.scales]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class Codec(ABC):
    """A way to write the differences of one parameter."""

    dtype: torch.dtype = torch.bfloat16  # of numbers; scales are float32

    @property
    @abstractmethod
    def name(self) -> str:
        """As the file names it."""

    @abstractmethod
    def encode(self, parameter: Parameter) -> EncodedParameter:
        """The parts of one parameter. Block by block of rows, or one task's difference at a time."""


def decode(
    shared: Mapping[str, Tensor], own: Mapping[str, Tensor], scale: float, shape: torch.Size, rows: slice
) -> Tensor:
    """One task's difference of the rows [r, W] of a parameter [R, W], in float32.

    `rows` begin at a multiple of `bits.ALIGNED`, or the parameter has no bits.
    """
    first, width = rows.start, shape[1]
    size = (rows.stop - first, width)
    if "d" in own:
        return own["d"][rows].float()
    if "U" in own:
        low = own["U"][rows].float() @ own["V"].float()
        return low + shared["s"][rows].float() if "s" in shared else low
    if "z" in own:
        return torch.einsum("p,prw->rw", own["z"].float(), shared["b"][:, rows].float())
    if not scale:
        return torch.zeros(size)
    if "t" in own:
        return unpack_trits(own["t"], first * width, size[0] * width).view(size).float() * scale
    unified = shared["u"][rows].float() * scale
    if "m" in own:  # without a mask everything is kept
        unified.masked_fill_(~unpack_bits(own["m"], first * width, size[0] * width).view(size), 0.0)
    return unified


def errors(parameter: Parameter, made: EncodedParameter) -> Tensor:
    """The squared norm of what every task's difference lacks, [K] float64."""
    lost = torch.zeros(parameter.tasks, dtype=torch.float64)
    for part, taus in parameter.blocks():
        for task, tau in enumerate(taus):
            back = decode(made.shared, made.own[task], float(made.scales[task]), parameter.shape, part)
            lost[task] += (tau.double() - back.double()).square().sum()
    return lost
