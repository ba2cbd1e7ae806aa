"""PCB-Merging: entries compete within an expert and are balanced between experts.

Du et al., NeurIPS 2024 (arXiv 2410.02396).

Legend: `K` experts, `n` entries of one parameter.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.piecewise import Piecewise, Rule
from trainmerge.system.ranges import check_fields
from trainmerge.task_vectors.delta import Delta, TaskVectors
from trainmerge.task_vectors.pieces import in_pieces
from trainmerge.task_vectors.top_k import Pieces, count, cuts

CLIPPED = 0.01  # magnitudes are clipped at this quantile and at one minus it


@dataclass(frozen=True)
class Pcb(Piecewise):
    """Weight each entry by a score, normalised over the experts.

        score_k = exp(K z_k^2) * sum_j tanh(z_k z_j),    result_k = s_k tau_k / sum_j s_j

    z is tau, its magnitudes clipped and scaled to [0, 1] over all parameters of the expert, and s the score
    scaled to [0, 1] from the lowest one that passes. The merge is base + coefficient x sum of the results,
    coefficient 1 to 2. Of the three formulas under this name this is the scale-equivariant one, with which
    the authors search coefficients. Entries whose sign the other experts oppose never pass.

    Args:
        density: Fraction of an expert's entries that pass; 0.05 to 0.2 in the paper.
    """

    density: float = 0.1

    def __post_init__(self) -> None:
        check_fields(self, density="(0, 1]")

    @override
    def rule(self, task_vectors: TaskVectors) -> Rule:
        pieces = [part for name, d in task_vectors.deltas.items() for _, _, part in in_pieces(name, d)]
        size = sum(piece.shape.numel() for piece in pieces)
        outliers = int(CLIPPED * size)

        def magnitudes() -> Iterator[Tensor]:
            return (_flat(piece) for piece in pieces)

        def scores() -> Iterator[Tensor]:
            return (_scores(taus, low, high) for taus in magnitudes())

        low, high = _kth(magnitudes, size - outliers), _kth(magnitudes, outliers + 1)
        last, best = _kth(scores, min(size, count(size, self.density) + 1)), _kth(scores, 1)
        return partial(_shared, low, high, last, best)


def _shared(low: Tensor, high: Tensor, last: Tensor, best: Tensor, _: str, delta: Delta) -> Tensor:
    """A piece's results, given the ranges [K, 1] of magnitudes and scores."""
    taus = _flat(delta)
    shares = _ranged(_scores(taus, low, high), last, best)
    clipped = taus.sign() * taus.abs().clamp(low, high)
    shared = shares * clipped / shares.sum(dim=0).clamp_min(1e-12)
    return shared.view(len(taus), *delta.shape)


def _flat(delta: Delta) -> Tensor:
    taus = delta.dense()
    return taus.view(len(taus), -1)


def _kth(pieces: Pieces, wanted: int) -> Tensor:
    """The `wanted`-th largest magnitude of each row, [K, 1]."""
    return torch.tensor([[cut.value] for cut in cuts(pieces, wanted)])


def _scores(taus: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """[K, n] -> [K, n] float32, as `cuts` ranks them; nonnegative, without the constant factor exp(K)."""
    span = torch.where(high > low, high - low, 1.0)
    size = torch.where(high > low, (taus.abs().clamp(low, high) - low) / span, (high > 0).to(taus))
    z = taus.sign() * size
    balance = torch.stack([torch.tanh(z * own).sum(dim=0) for own in z])
    return (torch.exp(len(z) * (z.square() - 1)) * balance).clamp_min(0).float()


def _ranged(scores: Tensor, last: Tensor, best: Tensor) -> Tensor:
    """Scale `last` (or less) to 0 and `best` to 1; 0 or 1 if these are equal."""
    span = torch.where(best > last, best - last, 1.0)
    alike = ((scores >= best) & (scores > 0)).to(scores)
    return torch.where(best > last, ((scores - last) / span).clamp(0, 1), alike)
