"""What one expert adds to one parameter: the five forms a difference can have.

Legend: `*S` parameter shape, `out`/`in` rows and columns of a matrix, `r` rank.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from trainmerge.kernels.quantised import Quantised


class Difference(NamedTuple):
    """A task vector that is given: tau = `tau`."""

    tau: Tensor  # [*S]


class ExpertWeight(NamedTuple):
    """A task vector taken inside the pass: tau = `weight` - base. `weight` may stay on disk, mapped."""

    weight: Tensor  # [*S]


class LowRank(NamedTuple):
    """A task vector that never becomes dense: tau = `scale` * `up` @ `down`."""

    up: Tensor  # [out, r]
    down: Tensor  # [r, in]
    scale: float


class Untouched(NamedTuple):
    """The expert did not change this parameter: tau = 0."""


Term = Difference | ExpertWeight | LowRank | Quantised | Untouched


def read_bytes(base: Tensor, terms: Sequence[Term]) -> int:
    """Bytes that a pass reads of one parameter's base and terms."""
    return base.nbytes + sum(part.nbytes for term in terms for part in term if isinstance(part, Tensor))


def rows_of(term: Term, part: slice) -> Term:
    """The same term of these rows of dimension 0: views, nothing is read."""
    match term:
        case Difference(tau):
            return Difference(tau[part])
        case ExpertWeight(weight):
            return ExpertWeight(weight[part])
        case LowRank(up, down, scale):
            return LowRank(up[part], down, scale)
        case Quantised(codes, scale):
            return Quantised(codes[part], scale if len(scale) == 1 else scale[part])
        case Untouched():
            return term
