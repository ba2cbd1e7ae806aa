"""Frank-Wolfe on quadratics whose least point over the simplex is known, and in a fit.

Legend: `K` experts, `G` coefficient groups.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import trainmerge as tm
from tests.world import recipe, write_world
from trainmerge.coefficients.constraints import Simplex
from trainmerge.coefficients.frank_wolfe import FrankWolfe, oracle
from trainmerge.run.recipe_files import calibration_files


def distance(target: Tensor):
    return lambda c: 0.5 * ((c - target) ** 2).sum()


def run(optimizer: FrankWolfe, parameter: nn.Parameter, loss, steps: int) -> list[tuple[float, float]]:
    """Loss and duality gap where each step began."""
    found = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(parameter)
        value.backward()
        return value

    for _ in range(steps):
        value = float(optimizer.step(closure).detach())
        found.append((value, optimizer.gap()))
    return found


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize(("total", "base"), [(1.0, False), (2.0, False), (1.0, True)])
def test_converges_to_the_projection_and_the_gap_certifies_it(
    search: bool, total: float, base: bool, generator: torch.Generator
) -> None:
    """The nearest point of the set to any target is its projection: one group inside, the others on faces."""
    target = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    target[:, 0] = total * torch.tensor([0.4, 0.3, 0.2, 0.1])
    set_ = Simplex(total, base)
    start = torch.full((4, 5), total / 4, dtype=torch.float64)
    parameter = nn.Parameter(start.clone())
    found = run(FrankWolfe([parameter], total, base, search=search), parameter, distance(target), 400)
    nearest = set_.project(target)
    least = float(distance(target)(nearest))
    assert all(gap >= value - least - 1e-12 for value, gap in found)  # the certificate
    assert min(gap for _, gap in found) < 5e-2 * total
    torch.testing.assert_close(parameter.data, nearest, rtol=0, atol=0.1 * total)
    torch.testing.assert_close(set_.project(parameter.data), parameter.data, rtol=0, atol=1e-9)


def test_a_search_on_a_line_ends_in_one_step() -> None:
    """Two experts, least a third of the way: the secant of a quadratic's slope is exact."""
    parameter = nn.Parameter(torch.tensor([[1.0], [0.0]]))
    run(FrankWolfe([parameter], search=True), parameter, distance(torch.tensor([[2 / 3], [1 / 3]])), 1)
    torch.testing.assert_close(parameter.data, torch.tensor([[2 / 3], [1 / 3]]))


def test_the_oracle_is_the_best_vertex(generator: torch.Generator) -> None:
    gradient = torch.randn(3, 6, generator=generator)
    vertices = torch.eye(3)
    for group in range(6):
        best = min(vertices, key=lambda vertex: float(vertex @ gradient[:, group]))
        assert torch.equal(oracle(gradient)[:, group], best)
    assert torch.equal(oracle(gradient.abs(), base=True), torch.zeros(3, 6))
    assert torch.equal(oracle(-gradient.abs(), 2.0, base=True), oracle(-gradient.abs(), 2.0))
    shared = oracle(gradient, shared=True)
    assert torch.equal(shared, shared[:, :1].expand(3, 6))


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="above 0"):
        FrankWolfe([nn.Parameter(torch.ones(2, 1))], total=0)
    with pytest.raises(ValueError, match="single tensor"):
        FrankWolfe([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))])


def test_a_fit_stays_in_the_hull_and_logs_the_gap(tmp_path: Path) -> None:
    write_world(tmp_path)
    merge = recipe(tmp_path)
    module = tm.MergeModule(
        merge,
        constraint=tm.Simplex(total=1.5),
        initial=0.5,
        optimizer=lambda c: tm.FrankWolfe(c, total=1.5, search=True),
        workspace=str(tmp_path / "run" / "workspace"),
    )
    data = tm.Calibration(calibration_files(merge), merge.base, batch_size=4, max_length=16)
    trainer = tm.make_trainer(tmp_path / "run", max_steps=2, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, data, trainer, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["gap"] > 0 for line in lines)
    values = module.coefficients().detach()
    torch.testing.assert_close(values.sum(dim=0), torch.full((values.shape[1],), 1.5))
    assert values.min() >= 0
