"""Newton steps on quadratics against their solution, at a trust region's boundary, and in a resumed fit."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.coefficients.optimised import fitted
from tests.world import recipe, write_world
from trainmerge.coefficients.newton import NewtonCG, least_within

K, G = 3, 4


def quadratic(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A positive definite matrix [KG, KG] and a target [K, G], in float64."""
    root = torch.randn(K * G, K * G, generator=generator, dtype=torch.float64)
    target = torch.randn(K, G, generator=generator, dtype=torch.float64)
    return root @ root.T + torch.eye(K * G), target


def one_step(optimizer: NewtonCG, parameter: nn.Parameter, loss) -> tuple[float, int]:
    """The loss where the step began, and how often the closure was called."""
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        value = loss(parameter)
        value.backward()
        return value

    return float(optimizer.step(closure)), calls


def test_one_step_solves_a_quadratic(generator: torch.Generator) -> None:
    matrix, target = quadratic(generator)
    parameter = nn.Parameter(torch.zeros(K, G, dtype=torch.float64))
    optimizer = NewtonCG([parameter], products=3 * K * G, radius=1e3)

    def loss(c: Tensor) -> Tensor:
        apart = (c - target).flatten()
        return 0.5 * apart @ matrix @ apart

    _, calls = one_step(optimizer, parameter, loss)
    assert calls <= 3 * K * G + 2
    # the stopping rule leaves a residual below 1e-3 |g| min(1/2, sqrt |g|): at most half a thousandth of it
    left = (matrix @ (parameter.detach() - target).flatten()).norm()
    assert float(left) <= 5e-4 * float((matrix @ target.flatten()).norm())
    one_step(optimizer, parameter, loss)
    torch.testing.assert_close(parameter.detach(), target, rtol=0, atol=1e-5)


def test_the_minimum_in_a_ball_is_at_its_boundary(generator: torch.Generator) -> None:
    matrix, target = quadratic(generator)
    gradient = -(matrix @ target.flatten())
    whole = least_within(gradient, lambda p: matrix @ p, 1e3, 100)
    assert not whole.bounded
    best = 0.5 * float(target.flatten() @ matrix @ target.flatten())
    assert whole.fall == pytest.approx(best, rel=1e-5)
    radius = 0.7 * float(whole.by.norm())
    inside = least_within(gradient, lambda p: matrix @ p, radius, 100)
    assert inside.bounded
    assert float(inside.by.norm()) == pytest.approx(radius)
    slope, bend = float(gradient @ gradient), float(gradient @ matrix @ gradient)
    length = min(slope / bend, radius / slope**0.5)  # to the least point along the gradient in the ball
    assert (length * slope - 0.5 * length**2 * bend) * (1 - 1e-9) <= inside.fall < whole.fall
    saddle = least_within(gradient, lambda p: -p, 2.0, 100)
    assert saddle.bounded
    assert float(saddle.by.norm()) == pytest.approx(2.0)


def test_a_step_that_does_not_lower_the_loss_is_not_taken() -> None:
    """The curvature at 0 says nothing of the wall at 0.3, nor of the infinity behind it."""
    for wall in (100.0, math.nan):
        parameter = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
        optimizer = NewtonCG([parameter], radius=2.0)

        def loss(c: Tensor, wall: float = wall) -> Tensor:
            far = c.sum() > 0.3
            return -c.sum() + 0.5 * c.square().sum() + (wall if far else 0.0)

        one_step(optimizer, parameter, loss)
        assert float(parameter.detach()) == 0
        assert optimizer.state[parameter]["radius"] == pytest.approx(0.25)
        one_step(optimizer, parameter, loss)
        assert float(parameter.detach()) == pytest.approx(0.25)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        NewtonCG([nn.Parameter(torch.ones(2, 1))], products=0)
    with pytest.raises(ValueError, match="single tensor"):
        NewtonCG([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))])


def test_a_resumed_fit_continues_bit_for_bit(tmp_path: Path) -> None:
    write_world(tmp_path)
    merge = recipe(tmp_path)
    whole = fitted(merge, tmp_path / "whole", partial(NewtonCG, products=3), 4)
    assert torch.equal(fitted(merge, tmp_path / "parts", partial(NewtonCG, products=3), 2, 4), whole)
    assert not torch.equal(whole, torch.full_like(whole, 0.5))
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert all(math.isfinite(json.loads(line)["loss"]) for line in lines)
