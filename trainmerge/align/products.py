"""How much two factors of attention changed, and how much their product.

Legend: `H` heads, `d` their size, `D` hidden size.
"""

from torch import Tensor

MOVED = 0.05  # relative change of the factors, below which nothing is reported
LOCKED = 0.2  # change of the product over that of the factors; fine-tuning has about 1


def changes(
    left: Tensor, right: Tensor, left_after: Tensor, right_after: Tensor, heads: int, shared: int
) -> tuple[float, float]:
    """Relative change of two factors [H d, D] and [H' d, D], and of their product per head.

    `heads` and `shared` are H and H'; H / H' heads of `left` share one of `right`. The D x D products are
    never formed: ||L^T R||^2 is <L L^T, R R^T>, of d x d matrices.
    """
    own, others = (
        [t.double().reshape(heads, -1, t.shape[-1]) for t in (left, left_after)],
        [
            t.double().reshape(shared, -1, t.shape[-1]).repeat_interleave(heads // shared, dim=0)
            for t in (right, right_after)
        ],
    )

    def inner(i: int, j: int) -> Tensor:
        return ((own[i] @ own[j].mT) * (others[i] @ others[j].mT)).sum()

    moved = (left_after - left).double().square().sum() + (right_after - right).double().square().sum()
    size = left.double().square().sum() + right.double().square().sum()
    difference = (inner(1, 1) + inner(0, 0) - 2 * inner(0, 1)).clamp(min=0)
    return float((moved / size).sqrt()), float((difference / inner(0, 0)).sqrt())


def is_locked(factors: float, product: float) -> bool:
    """Whether the factors changed, but hardly their product: a change of gauge, no training."""
    return factors > MOVED and product < LOCKED * factors
