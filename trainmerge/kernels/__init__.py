"""The two memory-bound passes of a merge, the forms of task vectors, and the backends that run them."""

from trainmerge.kernels.backend import (
    NAMES,
    inner_products,
    run_merges,
    run_products,
    shareable,
    using,
    waiting,
    weighted_sum,
)
from trainmerge.kernels.calls import Gathered, Merge, Product
from trainmerge.kernels.eager import accumulation_dtype, chunk_bounds
from trainmerge.kernels.quantised import Quantised
from trainmerge.kernels.terms import Difference, ExpertWeight, LowRank, Term, Untouched, bytes_read, rows_of

__all__ = [
    "NAMES",
    "Difference",
    "ExpertWeight",
    "Gathered",
    "LowRank",
    "Merge",
    "Product",
    "Quantised",
    "Term",
    "Untouched",
    "accumulation_dtype",
    "bytes_read",
    "chunk_bounds",
    "inner_products",
    "rows_of",
    "run_merges",
    "run_products",
    "shareable",
    "using",
    "waiting",
    "weighted_sum",
]
