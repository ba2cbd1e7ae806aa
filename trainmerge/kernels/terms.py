"""One expert's change of one parameter: the five forms of a difference.

Legend: `*S` parameter shape, `out`/`in` rows and columns of a matrix, `r` rank.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from trainmerge.kernels.quantised import Quantised


class Difference(NamedTuple):
    """A dense task vector: tau = `tau`."""

    tau: Tensor  # [*S]


class ExpertWeight(NamedTuple):
    """A task vector computed inside the pass: tau = `weight` - base. `weight` may be a mapped file."""

    weight: Tensor  # [*S]


class LowRank(NamedTuple):
    """A low-rank task vector, never made dense: tau = `scale` * `up` @ `down`."""

    up: Tensor  # [out, r]
    down: Tensor  # [r, in]
    scale: float


class Untouched(NamedTuple):
    """The expert did not change this parameter: tau = 0."""


Term = Difference | ExpertWeight | LowRank | Quantised | Untouched


def bytes_read(base: Tensor, terms: Sequence[Term]) -> int:
    """Bytes of one parameter's base and terms that a pass reads."""
    return base.nbytes + sum(part.nbytes for term in terms for part in term if isinstance(part, Tensor))


def rows_of(term: Term, part: slice) -> Term:
    """The same term for these rows of dimension 0: views, no data is read."""
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
