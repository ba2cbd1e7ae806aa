"""Projections against their definition, the nearest point of the set.

Legend: `K` experts, `G` coefficient groups.
"""

from itertools import combinations

import pytest
import torch

from tests.contracts import assert_constraint_contract, assert_same_bits
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.constraints import Box, Free, Sigmoid, Simplex
from trainmerge.coefficients.layout import Layout

INSIDE = torch.tensor([[0.2, 0.5, 0.1], [0.5, 0.25, 0.8], [0.3, 0.25, 0.1]])  # every column sums to one


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("constraint", [Free(), Box(), Box(-0.5, 2.0), Sigmoid(), Simplex()], ids=repr)
def test_contract(constraint, dtype, generator):
    raw = 3 * torch.randn(3, 3, generator=generator, dtype=dtype)
    assert_constraint_contract(constraint, INSIDE.to(dtype), raw)


def test_free_and_sigmoid_leave_raw_alone(generator):
    raw = 10 * torch.randn(4, 5, generator=generator)
    assert_same_bits(Free().project(raw), raw)
    assert_same_bits(Sigmoid().project(raw), raw)
    assert_same_bits(Free().values(raw), raw)
    torch.testing.assert_close(Sigmoid().values(raw), 1 / (1 + (-raw).exp()))


def test_box_takes_the_nearest_point(generator):
    raw = 2 * torch.randn(4, 50, generator=generator, dtype=torch.float64)
    grid = torch.linspace(
        -0.3, 0.9, 1201, dtype=torch.float64
    )  # all the points of the box, a thousandth apart
    nearest = grid[(raw[..., None] - grid).abs().argmin(-1)]
    torch.testing.assert_close(Box(-0.3, 0.9).project(raw), nearest, rtol=0, atol=5.001e-4)
    assert Box(-0.3, 0.9).project(raw).min() == -0.3
    assert Box(-0.3, 0.9).project(raw).max() == 0.9


def nearest_on_simplex(point):
    """Try every support: the nearest point with it moves all its coordinates by the same amount."""
    candidates = []
    for size in range(1, len(point) + 1):
        for support in combinations(range(len(point)), size):
            candidate = torch.zeros_like(point)
            chosen = point[list(support)]
            candidate[list(support)] = chosen - (chosen.sum() - 1) / size
            if (candidate >= 0).all():
                candidates.append(candidate)
    return min(candidates, key=lambda candidate: float((candidate - point).norm()))


@pytest.mark.parametrize("experts", [1, 2, 3, 5])
def test_simplex_takes_the_nearest_point_in_every_group(experts, generator):
    raw = torch.cat(
        [
            torch.randn(experts, 30, generator=generator, dtype=torch.float64),
            torch.randint(-2, 3, (experts, 30), generator=generator).double() / 2,  # ties
            torch.zeros(experts, 1, dtype=torch.float64),
        ],
        dim=1,
    )
    want = torch.stack([nearest_on_simplex(column) for column in raw.T], dim=1)
    torch.testing.assert_close(Simplex().project(raw), want)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e4, 1e8, 1e30])
@pytest.mark.parametrize("experts", [1, 2, 8])
def test_simplex_at_any_size(experts, scale, generator):
    """After a step that went astray, 1e8 - 1 is 1e8 in float32; the result must be in the set even so."""
    raw = scale * torch.randn(experts, 6, generator=generator)
    raw[:, 0] = scale  # all alike
    raw[:, 1] = -scale
    projected = Simplex().project(raw)
    assert (projected >= 0).all()
    torch.testing.assert_close(projected.sum(0), torch.ones(6))
    torch.testing.assert_close(projected[:, :2], torch.full((experts, 2), 1 / experts))


@pytest.mark.parametrize("border", [0.0, 1.0])
def test_box_does_not_kill_a_coefficient_on_its_border(border):
    """A clamp inside the graph would have no gradient after the first step outwards."""
    layout = Layout(("all",), {"w": (0,)})
    coefficients = Coefficients(["a", "b"], layout, border, Box())
    optimizer = torch.optim.SGD(coefficients.parameters(), lr=0.1)
    outwards = 2 * border - 1
    for direction, want in ((outwards, border), (-outwards, border - 0.1 * outwards)):
        optimizer.zero_grad()
        coefficients.backward(torch.full((2, 1), -direction))
        optimizer.step()
        coefficients.project_()
        torch.testing.assert_close(coefficients().detach(), torch.full((2, 1), want))


@pytest.mark.parametrize(
    ("constraint", "values", "message"),
    [
        (Box(), [[1.1], [0.5]], r"outside the box \[0.0, 1.0\]"),
        (Box(), [[-1e-3], [0.5]], "outside the box"),
        (Box(0.2, 0.4), [[0.3], [0.5]], r"outside the box \[0.2, 0.4\]"),
        (Sigmoid(), [[0.0], [0.5]], "strictly between 0 and 1"),
        (Sigmoid(), [[0.5], [1.0]], "strictly between 0 and 1"),
        (Simplex(), [[0.3], [0.3]], "sum to 1"),
        (Simplex(), [[1.5], [-0.5]], "sum to 1"),
    ],
    ids=repr,
)
def test_a_start_outside_the_set_is_refused(constraint, values, message):
    with pytest.raises(ValueError, match=message):
        constraint.start(torch.tensor(values))


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (1.0, 0.0)])
def test_an_empty_box_is_refused(low, high):
    with pytest.raises(ValueError, match="low < high"):
        Box(low, high)


def test_the_border_of_the_set_is_inside():
    """0.3 is not a float32 number: neither side of the comparison may be rounded alone."""
    third = torch.full((3, 1), 0.3)
    assert_same_bits(Box(0.3, 1.0).start(third), third)
    assert_same_bits(Box(0.0, 0.3).start(third), third)
    corner = torch.tensor([[0.0], [1.0], [0.0]])
    assert_same_bits(Simplex().start(corner), corner)
