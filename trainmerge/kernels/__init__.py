"""The two memory-bound passes of a merge, the forms of a task vector they take, and who runs them."""

from trainmerge.kernels.backend import (
    NAMES,
    gathers,
    inner_products,
    run_merges,
    run_products,
    using,
    waiting,
    weighted_sum,
)
from trainmerge.kernels.calls import Gathered, Merge, Product, touched
from trainmerge.kernels.eager import accumulation_dtype, chunk_bounds
from trainmerge.kernels.quantised import Quantised
from trainmerge.kernels.terms import Difference, ExpertWeight, LowRank, Term, Untouched, rows_of

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
    "chunk_bounds",
    "gathers",
    "inner_products",
    "rows_of",
    "run_merges",
    "run_products",
    "touched",
    "using",
    "waiting",
    "weighted_sum",
]
