"""A merge of differences that a rule computes piece by piece, written into a module's weights.

Legend: `K` experts, `C` chunks of one parameter.
"""

from torch import Tensor

from trainmerge.kernels import Difference
from trainmerge.preprocess import Rule
from trainmerge.task_vectors.delta import Delta
from trainmerge.task_vectors.pieces import in_pieces, merge_rows


def merge_by_rule(out: Tensor, name: str, delta: Delta, rule: Rule, coefficients: Tensor) -> None:
    """Write base + sum_k c_k rule(tau)_k of a parameter into `out`, as an export computes it.

    Coefficients [K, C].
    """
    for part, piece, some in in_pieces(name, delta):
        own = Delta(some.base, tuple(Difference(tau) for tau in rule(piece, some)))
        rows = out if part == slice(None) else out[part]
        merge_rows(rows, own, part.start or 0, coefficients, delta.shape)
