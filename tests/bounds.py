"""How far rounding may move a sum, a product or a merge, on any processor: the tests' tolerances.

A sum of n products of floating-point numbers, added in any order, with or without fused multiply-add, is off
by at most n u / (1 - n u) times the sum of the products' absolute values, u = eps / 2 (Higham, "Accuracy and
Stability of Numerical Algorithms", 2nd edition, section 3.1). These functions use n eps, twice that.

Legend: `*S` shape of the result.
"""

import torch
from torch import Tensor, nn

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


def log_softmax_bound(logits: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Error [*S] of log-probabilities of logits [*S, V], in `dtype`, and of any average of them.

    log p = (x - max) - log sum exp(x - max): each of the three rounds by its size, at most the logits' range
    and log V, and the sum has V terms.
    """
    span = logits.double().amax(-1) - logits.double().amin(-1)
    return sum_bound(1 + span, logits.shape[-1], dtype)


def aligned(module: nn.Module) -> nn.Module:
    """The module with its weights copied to where torch aligns them.

    transformers leaves weights at the file's own addresses, and a matrix product of the same numbers at
    another alignment may be rounded otherwise.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    return module


TERMS = 1024  # no sum in the passes of the tests' small models is longer: tokens, widths, words
SCORE = (
    TERMS * torch.finfo(torch.float32).eps
)  # relative: of losses and scores, two ways through such a model


def fitted_bound(steps: int, rate: float) -> float:
    """Error of a small model's coefficients after steps of this size along gradients of size 1 or less."""
    return steps * rate * SCORE
