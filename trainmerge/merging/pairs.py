"""Merges entry by entry, or by statistics of the parameter: nearswap, Arcee Fusion, SCE, RAM.

Legend: `K` models, `*S` shape of a parameter or of some rows of it, `R` rows.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from trainmerge.merging.group import Group, Piece, Rule
from trainmerge.task_vectors.top_k import cuts


def nearswap(group: Group, faithful: bool) -> Rule:
    """base + min(1, t / |tau|) tau: the model where it is within t of the base, t of the way elsewhere."""
    del faithful
    t = group.number("t")

    def rule(piece: Piece) -> Tensor:
        (tau,) = piece.taus
        return _base(piece) + torch.where(tau.abs() <= t, tau, tau * (t / tau.abs()).clamp(0, 1))

    return rule


def arcee_fusion(group: Group, faithful: bool) -> Rule:
    """The model's entries of outstanding importance; the base's elsewhere.

    Importance is |tau| times KL(softmax(row) || softmax(base row)) of its row; outstanding is above median +
    1.5 (Q3 - Q1) of the parameter, quantiles as the next lower entry (Arcee, MergeKit v0.1). mergekit adds
    1e-8 to every probability, and so does `faithful`.
    """
    added = 1e-8 if faithful else 0.0
    size = group.delta.shape.numel()

    def quantile(share: float) -> float:
        wanted = size - int(share * (size - 1))
        (cut,) = cuts(lambda: (_importance(piece, added).view(1, -1) for piece in group.pieces()), wanted)
        return cut.value

    limit = quantile(0.5) + 1.5 * (quantile(0.75) - quantile(0.25))

    def rule(piece: Piece) -> Tensor:
        return _base(piece) + piece.taus[0] * (_importance(piece, added) > limit)

    return rule


def _importance(piece: Piece, added: float) -> Tensor:
    base, (weight,), (tau,) = _base(piece), piece.weights, piece.taus
    rows = weight.reshape(-1, weight.shape[-1]).double()  # in float32 nothing of the divergence is left
    model, own = rows.log_softmax(-1), base.reshape(rows.shape).double().log_softmax(-1)
    if added:
        model, own = model.exp().add(added).log(), own.exp().add(added).log()
    divergence = (model.exp() * (model - own)).sum(-1, keepdim=True).clamp_min(0)  # [R, 1]
    importance: Tensor = (tau.abs().reshape(rows.shape) * divergence).to(tau.dtype)
    return importance.reshape(tau.shape)


def sce(group: Group, faithful: bool) -> Rule:
    """Select by variance, Calculate weights, Erase minorities (Wan et al., FuseChat, arXiv 2408.07990).

    The `select_topk` share of entries with the largest variance over the models stays; a model's weight is
    its share of the squares; entries that differ in sign from the models' sum are left out, and the rest is
    divided by the weights that took part.
    """
    share = group.number("select_topk")
    if not 0 < share <= 1:
        raise ValueError(f"{group.place.name}: select_topk is {share:g}; it is in (0, 1]")
    energy = torch.zeros(len(group.names), dtype=torch.float64)
    balance = 0.0
    for piece, taus in _selected(group, share):
        del piece
        energy += taus.double().square().flatten(1).sum(1)
        balance += float(taus.sum(0).sign().sum(dtype=torch.float64))
    weights = energy / energy.sum() if float(energy.sum()) else torch.ones_like(energy) / len(energy)
    majority = 1.0 if faithful or balance >= 0 else -1.0
    select = _selection(group, share)
    return lambda piece: _base(piece) + _agreeing(select(piece), weights, majority)


def _agreeing(taus: Tensor, weights: Tensor, majority: float) -> Tensor:
    sign = taus.sum(0).sign()
    sign[sign == 0] = majority
    shares = weights.to(taus.dtype).view(-1, *[1] * (taus.dim() - 1)) * (taus.sign() == sign)
    divisor = shares.sum(0)
    return (taus * shares).sum(0) / torch.where(divisor > 0, divisor, 1.0)


def _selected(group: Group, share: float) -> Iterator[tuple[Piece, Tensor]]:
    select = _selection(group, share)
    return ((piece, select(piece)) for piece in group.pieces())


def _selection(group: Group, share: float) -> Callable[[Piece], Tensor]:
    """The task vectors [K, *S] of a piece with the entries of small variance set to zero, pieces in order."""
    if share >= 1:
        return lambda piece: piece.taus
    wanted = int(share * group.delta.shape.numel() + 1e-6)
    if not wanted:
        return lambda piece: torch.zeros_like(piece.taus)
    (cut,) = cuts(lambda: (_variance(piece).view(1, -1) for piece in group.pieces()), wanted)
    return lambda piece: piece.taus * (cut(_variance(piece)) != 0)


def _variance(piece: Piece) -> Tensor:
    taus = piece.taus
    return (taus - taus.mean(0)).square_().mean(0)


def ram(group: Group, faithful: bool) -> Rule:
    """The mean of the task vectors that are active at an entry, |tau| > epsilon (RAM, arXiv 2601.13572)."""
    del faithful
    return partial(_active_mean, epsilon=group.number("epsilon"), factors=[1.0] * len(group.names))


def ramplus_tl(group: Group, faithful: bool) -> Rule:
    """RAM, where entries active in one model only are multiplied by 1 + r min(rho, alpha).

    rho is that model's number of shared entries over its number of unique ones, in this parameter.
    """
    del faithful
    epsilon, r, alpha = (group.number(key) for key in ("epsilon", "r", "alpha"))
    counts = torch.zeros(2, len(group.names), dtype=torch.int64)
    for piece in group.pieces():
        active = piece.taus.abs().flatten(1) > epsilon
        shared = active.sum(0) > 1
        counts += torch.stack([(active & shared).sum(1), (active & ~shared).sum(1)])
    factors = [1 + r * min(shared / unique, alpha) if unique else 1.0 for shared, unique in counts.T.tolist()]
    return partial(_active_mean, epsilon=epsilon, factors=factors)


def _active_mean(piece: Piece, epsilon: float, factors: list[float]) -> Tensor:
    taus = piece.taus
    active = taus.abs() > epsilon
    count = active.sum(0)
    scale = torch.tensor(factors, dtype=taus.dtype).view(-1, *[1] * (taus.dim() - 1))
    kept = torch.where(active, taus, 0.0)
    kept = torch.where(count == 1, kept * scale, kept)
    return _base(piece) + kept.sum(0) / count.clamp_min(1)


def _base(piece: Piece) -> Tensor:
    assert piece.base is not None
    return piece.base
