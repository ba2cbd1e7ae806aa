"""The two memory-bound passes of a merge, the forms of a task vector they take, and who runs them."""

from trainmerge.kernels.backend import NAMES, inner_products, using, weighted_sum
from trainmerge.kernels.eager import accumulation_dtype, chunk_bounds
from trainmerge.kernels.quantised import Quantised
from trainmerge.kernels.terms import Difference, ExpertWeight, LowRank, Term, Untouched, rows_of

__all__ = [
    "NAMES",
    "Difference",
    "ExpertWeight",
    "LowRank",
    "Quantised",
    "Term",
    "Untouched",
    "accumulation_dtype",
    "chunk_bounds",
    "inner_products",
    "rows_of",
    "using",
    "weighted_sum",
]
