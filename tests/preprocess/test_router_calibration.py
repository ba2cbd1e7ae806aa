"""Routers for several fine-tunes: minima, normal equations, and what both leave alone.

Legend: `E` experts of a layer, `H` hidden size, `R` states.
"""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tests.contracts import relative_error
from trainmerge.preprocess.router_calibration import harc, least_divergence, router_divergence

E, H, R = 6, 8, 400
TYPE = torch.float64


def world(seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Two unrelated routers [E, H], and states [R, H] of each."""
    dice = torch.Generator().manual_seed(seed)
    own = [torch.randn(E, H, generator=dice, dtype=TYPE) for _ in range(2)]
    mixes = [torch.randn(H, H, generator=dice, dtype=TYPE) / H**0.5 for _ in range(2)]
    states = [3 * torch.randn(R, H, generator=dice, dtype=TYPE) @ mix for mix in mixes]
    return own, states


def total(rows: Tensor, own: list[Tensor], states: list[Tensor], sigmoid: bool = False) -> Tensor:
    pairs = zip(states, own, strict=True)
    return torch.stack([router_divergence(rows, x, w, sigmoid) for x, w in pairs]).sum()


def test_divergences_are_those_of_the_distributions() -> None:
    own, (states, _) = world()
    p, q = ((states @ w.T).log_softmax(-1) for w in own)
    want = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    ).mean()
    torch.testing.assert_close(router_divergence(own[1], states, own[0]), want)
    a, b = (states @ w.T for w in own)  # from logits: a probability that rounds to 1 has no logarithm left
    sides = [(s * a).sigmoid() * (logsigmoid(s * a) - logsigmoid(s * b)) for s in (1, -1)]
    binary = sum(sides).sum(-1).mean()
    torch.testing.assert_close(router_divergence(own[1], states, own[0], sigmoid=True), binary)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_the_minimum_has_no_slope_and_is_below_harc_and_the_mean(sigmoid: bool) -> None:
    own, states = world()
    start = (own[0] + own[1]) / 2
    best = least_divergence(start, states, own, sigmoid)
    other = harc(start, states, own, 0.9, sigmoid)
    losses = [float(total(rows, own, states, sigmoid)) for rows in (best, other, start)]
    assert losses == sorted(losses)
    rows, first = best.requires_grad_(True), start.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(total(rows, own, states, sigmoid), rows)
    (steep,) = torch.autograd.grad(total(first, own, states, sigmoid), first)
    assert slope.norm() < 1e-4 * steep.norm()
    if not sigmoid:  # one vector on all rows changes nothing, so that part is the start's
        torch.testing.assert_close(best.mean(0), start.mean(0))


def dense_equations(states: list[Tensor], own: list[Tensor], shrink: float) -> tuple[Tensor, Tensor]:
    """HARC's system as one matrix [E H, E H], built entry by entry, and its right side."""
    system, right = torch.zeros(E * H, E * H, dtype=TYPE), torch.zeros(E * H, dtype=TYPE)
    for x, w in zip(states, own, strict=True):
        r = (x @ w.T).softmax(-1)
        curve = torch.diag_embed(r) - r[:, :, None] * r[:, None, :]
        part = torch.einsum("ref,rg,rh->egfh", curve, x, x).reshape(E * H, E * H) / len(x)
        part = shrink * part + (1 - shrink) * part.diagonal().diag()
        system, right = system + part, right + part @ w.flatten()
    return system, right


@pytest.mark.parametrize("shrink", [0.9, 1.0])
def test_harc_solves_its_normal_equations(shrink: float) -> None:
    own, states = world(1)
    start = (own[0] + own[1]) / 2
    got = harc(start, states, own, shrink)
    system, right = dense_equations(states, own, shrink)
    assert (system @ got.flatten() - right).norm() < 1e-5 * right.norm()
    flat = int((torch.linalg.eigvalsh(system).abs() < 1e-10 * system.norm()).sum())
    assert flat == (H if shrink == 1 else 0)
    if shrink == 1:
        torch.testing.assert_close(got.mean(0), start.mean(0))


@pytest.mark.parametrize("sigmoid", [False, True])
def test_one_router_of_all_stays_as_it_is(sigmoid: bool) -> None:
    (own, other), states = world(2)
    for start in (own, other):
        best = least_divergence(start, states, [own, own], sigmoid)
        curved = harc(start, states, [own, own], 0.9, sigmoid)
        assert total(best, [own, own], states, sigmoid) < 1e-9
        assert total(curved, [own, own], states, sigmoid) < 1e-9
    if not sigmoid:
        best, own = best - best.mean(0), own - own.mean(0)
    assert relative_error(best, own) < 1e-3
    torch.testing.assert_close(least_divergence(own, states, [own, own], sigmoid), own)


def test_harc_is_the_second_order_expansion_of_the_divergence() -> None:
    (own, other), (states, _) = world(3)
    step = 1e-3 * (other - own)
    r = (states @ own.T).softmax(-1)
    z = states @ step.T
    curve = ((r * z * z).sum(-1) - (r * z).sum(-1).square()).mean() / 2
    assert float(router_divergence(own + step, states, own)) == pytest.approx(float(curve), rel=1e-2)
