"""Merges on the sphere through the models' weights: SLERP, its relatives, the Karcher mean, Model Stock.

Legend: `K` models, `*S` shape of a parameter or of some rows of it.
"""

import torch
from torch import Tensor

from trainmerge.merging.group import Group, Piece, Rule
from trainmerge.merging.sphere import group_gram, nonzero, weighted_sum_rule
from trainmerge.task_vectors.sphere import TINY, exp, great_circle, inverse, karcher_mean, length, tangent

PARALLEL = 0.9995  # SLERP: above this cosine, and below its negative, the straight line


def slerp(group: Group, faithful: bool) -> Rule:
    """SLERP of two models, t of the way (Shoemake, 1985); nearly parallel ones on the straight line."""
    del faithful
    t = group.number("t")
    return weighted_sum_rule(great_circle(group_gram(group, tau=False), t, PARALLEL))


def nuslerp(group: Group, faithful: bool) -> Rule:
    """SLERP of two models, or of two task vectors, t = w_2 / (w_1 + w_2); per parameter, row or column."""
    del faithful
    first, second = group.numbers("weight")
    t = second / (first + second) if first + second else 0.5
    if group.flag("nuslerp_flatten") or group.delta.base.dim() < 2:
        return weighted_sum_rule(great_circle(group_gram(group, tau=group.based), t, 1 - TINY), group.based)
    along = 1 if not group.flag("nuslerp_row_wise") else 0
    return _per_vector(group, t, along)


def multislerp(group: Group, faithful: bool) -> Rule:
    """A weighted mean on the sphere: one step in the tangent plane of the normalised mean.

    Of the directions u_k with weights w_k: m = normalised sum w_k u_k, v = sum w_k (u_k - <u_k, m> m), and
    the result exp_m(v) times the weighted mean of the norms (goddard.blog, "Multi-SLERP").
    """
    del faithful
    weights = _weights(group)
    if group.flag("normalize_weights"):
        weights = weights / nonzero(float(weights.sum()), group, "weight")
    inner = group_gram(group, tau=group.based)
    norms = inner.diagonal().sqrt()
    units = inverse(norms)  # c of each direction is units[k] at k
    mean = weights * units
    size = length(mean, inner)
    if size < group.number("eps"):
        return weighted_sum_rule(torch.zeros_like(mean), group.based)
    mean = mean / size
    step = tangent(mean, inner, units, weights, logarithm=False)
    point = exp(mean, step, inner)
    return weighted_sum_rule(point * (weights * norms).sum(), group.based)


def karcher(group: Group, faithful: bool) -> Rule:
    """The Karcher mean of the models' directions, times the mean of their norms.

    Steps of the mean of the logarithms, until it is shorter than `tol`, `max_iter` at most (Karcher, 1977).
    """
    del faithful
    steps, tolerance = int(group.number("max_iter")), group.number("tol")
    return weighted_sum_rule(karcher_mean(group_gram(group, tau=False), steps, tolerance))


def model_stock(group: Group, faithful: bool) -> Rule:
    """t times the mean + (1 - t) base, t = K cos / (1 + (K - 1) cos), cos the task vectors' mean cosine.

    Jang et al., ECCV 2024 (arXiv 2403.19522). A negative cosine gives the base; mergekit extrapolates.
    """
    if group.flag("filter_wise") and group.delta.base.dim() > 1:
        return lambda piece: _stock_of_rows(piece, faithful)
    inner = group_gram(group, tau=True)
    return weighted_sum_rule(torch.full((len(inner),), _stock(inner, faithful), dtype=torch.float64), True)


def _stock_of_rows(piece: Piece, faithful: bool) -> Tensor:
    taus = piece.taus.double().flatten(2)  # [K, R, n]
    share = [_stock(rows @ rows.mT, faithful) for rows in taus.transpose(0, 1)]
    scale = torch.tensor(share, dtype=torch.float64).view(-1, *[1] * (piece.weights.dim() - 2))
    assert piece.base is not None
    return piece.base + (scale * piece.taus.double().sum(0)).to(piece.weights.dtype)


def _stock(inner: Tensor, faithful: bool) -> float:
    """The coefficient of each task vector, t / K."""
    count = len(inner)
    norms = inner.diagonal().sqrt()
    cosines = inner * inverse(norms)[:, None] * inverse(norms)
    cosine = float((cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1)))
    cosine = cosine if faithful else max(cosine, 0.0)
    return cosine / (1 + (count - 1) * cosine)


def _weights(group: Group) -> Tensor:
    return torch.tensor(group.numbers("weight"), dtype=torch.float64)


def _per_vector(group: Group, t: float, along: int) -> Rule:
    """SLERP of each row (`along` 1) or column (0) by its own angle."""
    if along == 1:
        return lambda piece: _slerped(piece, _products(_rows(piece), 1), t)
    totals = sum(_products(_rows(piece), 0) for piece in group.pieces())
    assert isinstance(totals, Tensor)
    return lambda piece: _slerped(piece, totals, t)


def _rows(piece: Piece) -> Tensor:
    return piece.weights if piece.base is None else piece.taus


def _products(rows: Tensor, along: int) -> Tensor:
    """<a, a>, <a, b>, <b, b> of two matrices' vectors along a dimension: [3, n, 1] or [3, 1, n], float64."""
    first, second = rows.double().flatten(2)
    pairs = ((first, first), (first, second), (second, second))
    return torch.stack([(a * b).sum(along, keepdim=True) for a, b in pairs])


def _slerped(piece: Piece, products: Tensor, t: float) -> Tensor:
    own, cross, other = products
    cosine = (cross * inverse((own * other).sqrt())).clamp(-1, 1)
    angle = torch.acos(cosine)
    straight = cosine.abs() > 1 - TINY
    sine = torch.where(straight, 1.0, torch.sin(angle))
    left = torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / sine)
    right = torch.where(straight, t, torch.sin(t * angle) / sine)
    rows = _rows(piece)
    flat = rows.flatten(2)
    merged = (left.to(rows.dtype) * flat[0] + right.to(rows.dtype) * flat[1]).view(rows.shape[1:])
    return merged if piece.base is None else piece.base + merged
