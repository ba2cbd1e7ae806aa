"""M-SMoE's groups (ICLR 2024, arXiv 2310.01334): the most used experts, and those that are routed alike.

Its code shares one threshold of usage among all layers, which an ordinary checkpoint with one number of
experts cannot say: here each layer keeps equally many. It also leaves all rows of the router and binds them;
here the kept experts' rows are left, as in all plans.

Legend: `E` experts of a layer.
"""

from collections.abc import Sequence

from torch import Tensor


def routed_alike(alike: Tensor) -> Tensor:
    """Cosines of the experts' router logits over all tokens, moved to [0, 1]: [E, E] of their inner products.

    >>> from torch import tensor
    >>> routed_alike(tensor([[4.0, -2.0], [-2.0, 1.0]])).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    sizes = alike.diagonal().clamp_min(1e-300).rsqrt()
    return (sizes[:, None] * alike * sizes + 1) / 2


def join_nearest(kept: Sequence[int], alike: Tensor) -> list[list[int]]:
    """Each expert that is not kept joins the kept one with the largest similarity [E, E]; kept ones first."""
    groups = {number: [number] for number in kept}
    for number in range(len(alike)):
        if number not in groups:
            nearest = max(kept, key=lambda other: float(alike[number, other]))
            groups[nearest].append(number)
    return [groups[number] for number in kept]
