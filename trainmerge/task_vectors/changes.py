"""One parameter's change by a merge: a weighted sum of differences, in pieces or as stacked factors.

Legend: `T` terms, `C` chunks of the parameter's rows, `*S` its shape, `m x n` a matrix, `R` stacked rank.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trainmerge.kernels import Difference, LowRank, Term, Untouched, chunk_bounds, rows_of
from trainmerge.task_vectors.delta import Delta, dense_term
from trainmerge.task_vectors.factors import product_square
from trainmerge.task_vectors.pieces import in_pieces
from trainmerge.task_vectors.roles import Role


@dataclass(frozen=True)
class Change:
    """sum_t weights[t, chunk] tau_t of one parameter.

    Args:
        name: The base's tensor.
        delta: The base and K terms.
        weights: [T, C]; T is K and the number of terms in `plus`.
        rule: A preprocessor's, which replaces the K terms piece by piece.
        plus: Terms that the rule leaves as they are.
    """

    name: str
    delta: Delta
    weights: Tensor
    rule: Callable[[str, Delta], Tensor] | None = None
    plus: tuple[Term, ...] = ()

    @property
    def shape(self) -> torch.Size:
        """The parameter's shape, [*S]."""
        return self.delta.shape

    @property
    def role(self) -> Role:
        """What the parameter is in its layer."""
        return self.delta.role

    @property
    def used(self) -> tuple[tuple[Term, Tensor], ...]:
        """Terms that change something, each with its weights [C], before the rule."""
        pairs = zip((*self.delta.terms, *self.plus), self.weights, strict=True)
        return tuple(pair for pair in pairs if not isinstance(pair[0], Untouched) and bool(pair[1].any()))

    @property
    def low_rank(self) -> bool:
        """Whether all terms that change something are products of factors."""
        return self.rule is None and all(isinstance(term, LowRank) for term, _ in self.used)

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Factors up [m, R] and down [R, n] in float64 whose product is the change; only if `low_rank`.

        A chunk's weight multiplies its rows of `up`, so the product is exact for any chunks.
        """
        ups, downs = (
            [torch.zeros(self.shape[0], 0).double()],
            [torch.zeros(0, self.shape[1:].numel()).double()],
        )
        for term, weights in self.used:
            assert isinstance(term, LowRank)
            ups.append(term.up.double() * (term.scale * self._per_row(weights))[:, None])
            downs.append(term.down.double())
        return torch.cat(ups, dim=1), torch.cat(downs)

    def blocks(self) -> Iterator[Tensor]:
        """The change as consecutive pieces of rows, float64."""
        every = (*self.weights,)
        for part, piece, some in in_pieces(self.name, self.delta):
            terms = some.terms if self.rule is None else tuple(map(Difference, self.rule(piece, some)))
            rows = [rows_of(term, part) for term in self.plus]
            total = torch.zeros_like(some.base, dtype=torch.float64)
            wide = some.base.double()
            for term, weights in zip((*terms, *rows), every, strict=True):
                if not isinstance(term, Untouched) and bool(weights.any()):
                    scale = self._shaped(weights)
                    total += dense_term(term, wide).double() * (scale[part] if self.shape else scale)
            yield total

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The change itself, [*S]."""
        out, first = torch.empty(self.shape, dtype=dtype), 0
        for block in self.blocks():
            if block.dim() == 0:
                return block.to(dtype)
            out[first : first + len(block)] = block
            first += len(block)
        return out

    def square(self) -> float:
        """The squared norm."""
        if self.low_rank and len(self.shape) > 1:
            return product_square(*self.stacked())
        return sum(float(block.square().sum()) for block in self.blocks())

    def _per_row(self, weights: Tensor) -> Tensor:
        """Weights [C] of the chunks -> of the rows, float64."""
        bounds = torch.tensor(chunk_bounds(self.shape[0] if self.shape else 1, len(weights)))
        return weights.double().repeat_interleave(bounds.diff())

    def _shaped(self, weights: Tensor) -> Tensor:
        """The weights of the rows, in a shape that multiplies the parameter."""
        rows = self._per_row(weights)
        return rows.view(-1, *[1] * (len(self.shape) - 1)) if self.shape else rows[0]
