"""base + lambda sum_k w_k tau_k, of whole or sparse task vectors, with or without an election of signs.

Linear merges, task arithmetic, TIES, DARE, Model Breadcrumbs and DELLA as mergekit's files name them.

Legend: `K` models, `*S` shape of a parameter or of some rows of it.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from trainmerge.merging.group import Group, Piece, Rule
from trainmerge.merging.sparse import ByRank, Largest, Random, Scaled, Sparse, Whole, norm_factor
from trainmerge.merging.sphere import nonzero, weighted, weighted_sum_rule

Choice = Callable[[Group, int, bool], Sparse]  # group, model, faithful -> what of its task vector is kept


def linear_merge(group: Group, faithful: bool) -> Rule:
    """sum_k w_k W_k, divided by sum_k w_k if `normalize` (Wortsman et al., arXiv 2203.05482)."""
    del faithful
    weights = torch.tensor(group.numbers("weight"), dtype=torch.float64)
    if group.flag("normalize"):
        weights = weights / nonzero(float(weights.sum()), group, "weight")
    return weighted_sum_rule(weights)


def summed(group: Group, faithful: bool, choice: Choice) -> Rule:
    """lambda sum_k w_k kept_k, divided by sum_k w_k if `normalize`."""
    weights = group.numbers("weight")
    scale = group.number("lambda")
    if group.flag("normalize"):
        scale /= nonzero(sum(weights), group, "weight")
    kept = _kept(group, faithful, choice)
    shares = [scale * weight for weight in weights]
    return lambda piece: _base(piece) + weighted(kept(piece), shares)


def elected(group: Group, faithful: bool, choice: Choice) -> Rule:
    """lambda times the sum of the w_k kept_k that have the sign of sum_k w_k kept_k.

    With `normalize`, divided by the sum of the weights that took part (Yadav et al., arXiv 2306.01708, with
    weights). Where the sum is 0, the majority of the parameter's signs decides; mergekit takes +.
    """
    weights = torch.tensor(group.numbers("weight"), dtype=torch.float64)
    kept = _kept(group, faithful, choice)
    majority = 1.0 if faithful else _majority(group, weights, kept)
    if choice is largest_entries or choice is middle:
        kept = _kept(group, faithful, choice)  # cuts go through the pieces once, in order
    return partial(
        _elected, weights=weights, kept=kept, majority=majority, scale=group.number("lambda"),
        normalize=group.flag("normalize"),
    )  # fmt: skip


def _elected(
    piece: Piece,
    weights: Tensor,
    kept: Callable[[Piece], Tensor],
    majority: float,
    scale: float,
    normalize: bool,
) -> Tensor:
    rows = kept(piece)
    shares = weights.to(rows.dtype).view(-1, *[1] * (rows.dim() - 1))
    votes = rows * shares
    sign = votes.sum(0).sign_()
    sign[sign == 0] = majority
    agree = votes.sign() == sign
    total = torch.where(agree, votes, 0.0).sum(0)
    if normalize:
        divisor = (agree * shares).sum(0)
        total /= torch.where(divisor.abs() < 1e-8, 1.0, divisor)
    return _base(piece) + scale * total


def _majority(group: Group, weights: Tensor, kept: Callable[[Piece], Tensor]) -> float:
    """The sign that most entries of the weighted sum have, +1 or -1."""
    balance = 0.0
    for piece in group.pieces():
        rows = kept(piece)
        total = (rows * weights.to(rows.dtype).view(-1, *[1] * (rows.dim() - 1))).sum(0)
        balance += float(total.sign_().sum(dtype=torch.float64))
    return 1.0 if balance >= 0 else -1.0


def _kept(group: Group, faithful: bool, choice: Choice) -> Callable[[Piece], Tensor]:
    """The kept entries of all models, [K, *S]."""
    chosen = [choice(group, model, faithful) for model in range(len(group.names))]
    if group.flag("rescale") and choice in (largest_entries, middle):  # the L1 norm of what was trimmed
        factors = [norm_factor(group, model, one) for model, one in enumerate(chosen)]
        again = [choice(group, model, faithful) for model in range(len(chosen))]
        chosen = [Scaled(one, factor) for one, factor in zip(again, factors, strict=True)]
    return partial(_of_all, chosen)


def _of_all(chosen: Sequence[Sparse], piece: Piece) -> Tensor:
    return torch.stack([one(tau, piece.name) for one, tau in zip(chosen, piece.taus, strict=True)])


def _base(piece: Piece) -> Tensor:
    assert piece.base is not None
    return piece.base


def all_entries(group: Group, model: int, faithful: bool) -> Sparse:
    """All entries."""
    del group, model, faithful
    return Whole()


def largest_entries(group: Group, model: int, faithful: bool) -> Sparse:
    """The `density` largest."""
    del faithful
    density = density_of(group, model)
    return Whole() if density >= 1 else Largest(group, model, density)


def middle(group: Group, model: int, faithful: bool) -> Sparse:
    """The `density` largest after the `gamma` largest (Davari and Belilovsky, arXiv 2312.06795)."""
    del faithful
    density = density_of(group, model)
    return Whole() if density >= 1 else Largest(group, model, density, group.numbers("gamma")[model])


def random(group: Group, model: int, faithful: bool) -> Sparse:
    """Random ones, divided by `density` (Yu et al., arXiv 2311.03099); mergekit keeps the L1 norm."""
    density, name = density_of(group, model), group.names[model]
    if density >= 1:
        return Whole()
    rescale = group.flag("rescale")
    if rescale and faithful:
        plain = Random(name, density, rescale=False)
        return Scaled(plain, norm_factor(group, model, plain))
    return Random(name, density, rescale)


def ranked(group: Group, model: int, faithful: bool) -> Sparse:
    """Random ones by rank, divided by their probability; mergekit keeps the L1 norm (arXiv 2406.11617)."""
    density, epsilon, name = density_of(group, model), group.numbers("epsilon")[model], group.names[model]
    if density >= 1:
        return Whole()
    if not (density - epsilon > 0 and density + epsilon < 1 and epsilon >= 0):
        raise ValueError(
            f"{group.place.name}: density {density:g} and epsilon {epsilon:g} of {name} give probabilities "
            f"from {density - epsilon:g} to {density + epsilon:g}; both must be between 0 and 1"
        )
    rescale = group.flag("rescale")
    if rescale and faithful:
        plain = ByRank(name, density, epsilon, rescale=False)
        return Scaled(plain, norm_factor(group, model, plain))
    return ByRank(name, density, epsilon, rescale)


def density_of(group: Group, model: int) -> float:
    """A model's density, in [0, 1]."""
    density = group.numbers("density")[model]
    if not 0 <= density <= 1:
        raise ValueError(
            f"{group.place.name}: density of {group.names[model]} is {density:g}; it is in [0, 1]"
        )
    return density
