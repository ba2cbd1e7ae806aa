"""A merge of differences that a rule computes piece by piece, written into a module's weights.

Legend: `K` experts, `C` chunks of one parameter.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from trainmerge.kernels import Difference
from trainmerge.preprocess import Rule
from trainmerge.task_vectors.delta import Delta
from trainmerge.task_vectors.pieces import in_pieces, merge_rows


def merge_by_rule(
    outs: Mapping[str, Tensor], deltas: Mapping[str, Delta], rule: Rule, of: Callable[[str], Tensor]
) -> None:
    """Write base + sum_k c_k rule(tau)_k of parameters into `outs`, as an export computes it.

    `of` gives a parameter's coefficients [K, C].
    """
    for name, out in outs.items():
        for part, piece, some in in_pieces(name, deltas[name]):
            own = Delta(some.base, tuple(Difference(tau) for tau in rule(piece, some)))
            rows = out.data if part == slice(None) else out.data[part]
            merge_rows(rows, own, part.start or 0, of(name), deltas[name].shape)
