"""RAM and RAM+: entries that one expert alone changed keep their size; shared ones are averaged.

Yuan et al., 2026 (arXiv 2601.13572), for experts trained by reinforcement learning, whose task vectors are
sparse and overlap little.

Legend: `K` experts, `*S` shape of a parameter or of some rows of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.piecewise import Piecewise, Rule
from trainmerge.system.ranges import check_fields
from trainmerge.task_vectors.delta import Delta, TaskVectors
from trainmerge.task_vectors.pieces import in_pieces


@dataclass(frozen=True)
class Ram(Piecewise):
    """tau_k / count of the experts with |tau| > epsilon at an entry; the other entries are 0.

    Entries of expert k alone are multiplied by 1 + rescale min(shared_k / unique_k, limit) (RAM+), of which
    0 is plain RAM. The merge is base + sum of the results, coefficient 1.

    Args:
        epsilon: Entries up to this magnitude count as unchanged.
        rescale: r of RAM+, 0.1 in mergekit's `ramplus_tl`.
        limit: alpha of RAM+, 0.2 there.
        scope: `global` counts shared and unique entries over all parameters; `parameter` within each, as
            `ramplus_tl` does.
    """

    epsilon: float = 1e-5
    rescale: float = 0.0
    limit: float = 0.2
    scope: Literal["global", "parameter"] = "global"

    def __post_init__(self) -> None:
        check_fields(self, epsilon="[0, inf)", rescale="[0, inf)", limit="[0, inf)")

    @override
    def rule(self, task_vectors: TaskVectors) -> Rule:
        experts = len(task_vectors.experts)
        factors = {name: torch.ones(experts, dtype=torch.float64) for name in task_vectors.deltas}
        if self.rescale:
            counts = {name: self._counts(name, delta) for name, delta in task_vectors.deltas.items()}
            whole = torch.stack(list(counts.values())).sum(dim=0)
            shares = counts if self.scope == "parameter" else dict.fromkeys(counts, whole)
            factors = {name: self._factors(own) for name, own in shares.items()}
        pieces = {p: n for n, delta in task_vectors.deltas.items() for _, p, _ in in_pieces(n, delta)}
        return Averaged(self.epsilon, {piece: factors[name] for piece, name in pieces.items()})

    def _counts(self, name: str, delta: Delta) -> Tensor:
        """Shared and unique entries of each expert, [2, K]."""
        found = torch.zeros(2, len(delta.terms), dtype=torch.int64)
        for _, _, part in in_pieces(name, delta):
            active = part.dense().abs_().reshape(len(part.terms), -1) > self.epsilon
            shared = active.sum(dim=0) > 1
            found += torch.stack([(active & shared).sum(dim=1), (active & ~shared).sum(dim=1)])
        return found

    def _factors(self, counts: Tensor) -> Tensor:
        shared, unique = counts.double()
        ratio = torch.where(unique > 0, shared / unique.clamp_min(1), 0.0)
        return 1 + self.rescale * ratio.clamp_max(self.limit)


@dataclass(frozen=True)
class Averaged:
    """The rule after its first pass: each piece's factors of unique entries, [K]."""

    epsilon: float
    factors: Mapping[str, Tensor]

    def __call__(self, name: str, delta: Delta) -> Tensor:
        """A piece's new differences, [K, *S]."""
        taus = delta.dense()
        active = taus.abs() > self.epsilon
        count = active.sum(dim=0)
        factors = self.factors[name].to(taus).view(-1, *[1] * (taus.dim() - 1))
        return torch.where(count == 1, taus * factors, taus / count.clamp_min(1)).mul_(active)
