"""How far rounding may move a sum, a product or a merge, on any processor: the tests' tolerances.

A sum of n products of floating-point numbers, added in any order, with or without fused multiply-add, is off
by at most n u / (1 - n u) times the sum of the products' absolute values, u = eps / 2 (Higham, "Accuracy and
Stability of Numerical Algorithms", 2nd edition, section 3.1). These functions use n eps, twice that.

Legend: `*S` shape of the result.
"""

import torch
from torch import Tensor

OWN = 3  # roundings per product before the addition: of the difference, of the product, of a cast


def sum_bound(size: Tensor, terms: int, dtype: torch.dtype) -> Tensor:
    """Error [*S] of a sum of `terms` products in `dtype` whose absolute values sum to `size` [*S]."""
    return (terms + OWN) * torch.finfo(dtype).eps * size.double()


def assert_within(got: Tensor, want: Tensor, bound: Tensor | float) -> None:
    """|got - want| <= bound, element by element; a NaN or an infinity in `got` fails."""
    assert got.shape == want.shape
    error = (got.double() - want.double()).abs()
    worst = (error - bound).max() if error.numel() else error.new_zeros(())
    assert (error <= bound).all(), f"an error is {float(worst):.3g} above its bound"


def assert_sums_agree(got: Tensor, want: Tensor, size: Tensor, terms: int, dtype: torch.dtype) -> None:
    """Two sums of the same `terms` products, in any two orders, as both may be off."""
    assert got.dtype == want.dtype
    assert_within(got, want, 2 * sum_bound(size, terms, dtype))
