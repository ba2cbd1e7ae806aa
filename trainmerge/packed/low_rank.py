"""Thin factors of every task's difference: TSV-Compress, Twin-Merging, and LoRA experts as they are.

The best factors of a rank are the leading singular triples. TSV-C (Gargiulo et al., arXiv 2412.00081) keeps
min(R, W) / K of them a task. Twin-Merging (Lu et al., arXiv 2406.15479) first subtracts a shared difference.
A difference that has this rank already, such as a LoRA's, is exact up to the rounding of its factors.

Legend: `K` tasks, `R` rows, `W` entries of a row, `r` rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.kernels import LowRank as LowRankTerm
from trainmerge.kernels import Untouched
from trainmerge.packed.codec import Codec, EncodedParameter
from trainmerge.packed.parameter import Parameter
from trainmerge.system.ranges import check_fields
from trainmerge.task_vectors.factors import Budget, Factors, recompress, truncate


@dataclass(frozen=True)
class Dense(Codec):
    """Every task's difference itself, 16 bits per weight: of vectors, and where nothing smaller is wanted."""

    @property
    @override
    def name(self) -> str:
        return "dense"

    @override
    def encode(self, parameter: Parameter) -> EncodedParameter:
        own: list[dict[str, Tensor]] = []
        for task in range(parameter.tasks):
            tau = parameter.tau(task)
            own.append({"d": tau.to(self.dtype)} if bool(tau.any()) else {})
        return EncodedParameter({}, tuple(own), torch.tensor([float(bool(parts)) for parts in own]))


@dataclass(frozen=True)
class LowRankCodec(Codec):
    """Factors of one rank. Vectors, and matrices that factors do not make smaller, are dense.

    Args:
        rank: r; None is min(R, W) / K.
        shared: The part of the tasks' sum that is subtracted first, Twin-Merging's 0.3. It is left out where
            it does not lower the error, because it may raise the rank.
    """

    rank: int | None = None
    shared: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "lowrank", rank="[1, inf)", shared="[0, 1]")

    @property
    @override
    def name(self) -> str:
        return "lowrank"

    @override
    def encode(self, parameter: Parameter) -> EncodedParameter:
        rows, width = parameter.shape
        rank = self.rank or max(1, min(rows, width) // parameter.tasks)
        if len(parameter.whole.shape) < 2:
            return Dense(self.dtype).encode(parameter)
        found = [self._factors(parameter, task, rank) for task in range(parameter.tasks)]
        shared: dict[str, Tensor] = {}
        if self.shared:
            part = (self.shared * parameter.total()).to(self.dtype)
            others = [self._factors(parameter, task, rank, part) for task in range(parameter.tasks)]
            if sum(one.lost for one in others) < sum(one.lost for one in found):
                found, shared = others, {"s": part}
        if not shared and all((rows + width) * one.rank >= rows * width for one in found):
            return Dense(self.dtype).encode(parameter)
        return of_factors(found, shared)

    def _factors(self, parameter: Parameter, task: int, rank: int, part: Tensor | None = None) -> Factors:
        term, budget = parameter.delta.terms[task], Budget(rank)
        rows, width = parameter.shape
        if part is not None:
            return truncate(parameter.tau(task) - part, budget).rounded(self.dtype)
        if isinstance(term, Untouched):
            empty = torch.zeros(rows, 0, dtype=self.dtype), torch.zeros(0, width, dtype=self.dtype)
            return Factors(*empty, 0.0, 0.0, "exact")
        if isinstance(term, LowRankTerm):
            up, down = term.up.double() * term.scale, term.down.double()
            return recompress(up, down.reshape(len(down), width), budget).rounded(self.dtype)
        return truncate(parameter.tau(task), budget).rounded(self.dtype)


def of_factors(found: Sequence[Factors], shared: dict[str, Tensor]) -> EncodedParameter:
    """Factors as parts."""
    own = ({"U": f.up.contiguous(), "V": f.down.contiguous()} if f.rank or shared else {} for f in found)
    return EncodedParameter(
        shared, tuple(own), torch.tensor([float(f.rank > 0 or bool(shared)) for f in found])
    )
