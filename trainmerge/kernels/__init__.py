"""The two memory-bound passes of a merge, and the forms of a task vector they take."""

from trainmerge.kernels.eager import accumulation_dtype, chunk_bounds, inner_products, weighted_sum
from trainmerge.kernels.quantised import Quantised
from trainmerge.kernels.terms import Difference, ExpertWeight, LowRank, Term, Untouched

__all__ = [
    "Difference",
    "ExpertWeight",
    "LowRank",
    "Quantised",
    "Term",
    "Untouched",
    "accumulation_dtype",
    "chunk_bounds",
    "inner_products",
    "weighted_sum",
]
