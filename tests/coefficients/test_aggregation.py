"""Conflicting gradients: rules against their closed forms, inside a fit that resumes bit for bit."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchjd.aggregation import MGDA, CAGrad, Mean, PCGrad, Sum

import trainmerge as tm
from tests.contracts import relative_error
from tests.fitting.test_fit import fit_world
from tests.world import languages_recipe, write_languages, write_world
from trainmerge.coefficients.aggregation import aggregate_gradients
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.layout import Grouping
from trainmerge.data.batch import Batch
from trainmerge.kernels import Difference, ExpertWeight, LowRank
from trainmerge.model.merged_model import MergedModel
from trainmerge.preprocess.subspace import shared_subspace
from trainmerge.run.recipe_files import calibration_files

ROWS = torch.tensor([[[1.0, 0.0]], [[-0.5, 1.0]]])  # m = 2, K = 1, G = 2


def test_rules_are_their_closed_forms() -> None:
    a, b = ROWS.flatten(1)
    assert torch.equal(aggregate_gradients(ROWS, Sum(), 0), (a + b)[None])
    assert torch.equal(aggregate_gradients(ROWS, Mean(), 0), (a + b)[None] / 2)
    projected = [x - (x @ y) / (y @ y) * y for x, y in ((a, b), (b, a))]  # both conflict with the other
    torch.testing.assert_close(aggregate_gradients(ROWS, PCGrad(), 0), sum(projected)[None])
    share = ((b - a) @ b) / (a - b).square().sum()  # the shortest vector between a and b
    torch.testing.assert_close(
        aggregate_gradients(ROWS, MGDA(), 0), (share * a + (1 - share) * b)[None], rtol=1e-2, atol=1e-2
    )


def test_the_result_descends_on_every_row() -> None:
    for rule in (PCGrad(), MGDA()):
        assert bool((ROWS.flatten(1) @ aggregate_gradients(ROWS, rule, 0).flatten() >= -1e-6).all())


class Dice(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return torch.rand(rows.shape[1]) * rows.sum(dim=0)


def test_dice_are_thrown_from_the_seed_and_leave_others_alone() -> None:
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    first = aggregate_gradients(ROWS, Dice(), 3)
    assert torch.equal(torch.rand(1), want)
    assert torch.equal(aggregate_gradients(ROWS, Dice(), 3), first)
    assert not torch.equal(aggregate_gradients(ROWS, Dice(), 4), first)


def test_a_rule_that_makes_no_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Identity returned \(2, 2\) for rows \(2, 2\)"):
        aggregate_gradients(ROWS, nn.Identity(), 0)


def test_a_sum_is_what_a_fit_does_anyway(tmp_path: Path) -> None:
    write_world(tmp_path)
    plain = fit_world(tmp_path, tmp_path / "plain", steps=4)
    summed = fit_world(tmp_path, tmp_path / "summed", steps=4, combine=Sum())
    # Adam divides a gradient by its size: where terms cancel, rounding moves by a share of the step, 0.02
    torch.testing.assert_close(summed.coefficients(), plain.coefficients(), rtol=0, atol=4 * 0.02 / 20)


def test_a_fit_with_a_rule_resumes_bit_for_bit(tmp_path: Path) -> None:
    write_world(tmp_path)
    whole = fit_world(tmp_path, tmp_path / "whole", steps=6, combine=PCGrad(), objective=tm.Alignment())
    for steps in (3, 6):
        parts = fit_world(
            tmp_path, tmp_path / "parts", steps=steps, combine=PCGrad(), objective=tm.Alignment()
        )
    assert torch.equal(whole.coefficients(), parts.coefficients())
    with pytest.raises(ValueError, match="combine"):
        fit_world(tmp_path, tmp_path / "parts", steps=8, combine=MGDA(), objective=tm.Alignment())


def test_cagrad_is_near_the_mean_and_good_for_the_worst() -> None:
    """max over d of min_i <g_i, d>, |d - g| <= c |g|, g the mean: by trying all directions of a circle."""
    pytest.importorskip("cvxpy", reason="pip install .[conflicts]")
    rows = ROWS.flatten(1)
    mean = rows.mean(0)
    angles = torch.linspace(0, 2 * torch.pi, 3601)
    around = mean + 0.5 * mean.norm() * torch.stack([angles.cos(), angles.sin()], dim=1)
    best = around[(around @ rows.T).amin(1).argmax()]
    torch.testing.assert_close(aggregate_gradients(ROWS, CAGrad(c=0.5), 0), best[None], rtol=5e-3, atol=5e-3)


def projected_onto_the_dual_cone(row: Tensor, rows: Tensor) -> Tensor:
    """The v nearest to a row [n] with <g, v> >= 0 for all rows [m, n]: row + some rows, by trying all."""
    found = [row]
    for mask in range(1, 2 ** len(rows)):
        some = rows[[i for i in range(len(rows)) if mask >> i & 1]]
        weights = torch.linalg.solve(some @ some.T, -some @ row)
        found += [row + weights @ some] * bool((weights >= 0).all())
    feasible = [v for v in found if (rows @ v >= -1e-9 * rows.norm() * v.norm()).all()]
    return min(feasible, key=lambda v: float((v - row).norm()))


def test_upgrad_projects_each_row_onto_the_dual_cone() -> None:
    """The mean of the projections, in float64; TorchJD's solver adds 1e-4 to the Gramian."""
    pytest.importorskip("quadprog", reason="pip install .[conflicts]")
    from torchjd.aggregation import UPGrad

    dice = torch.Generator().manual_seed(0)
    for _ in range(50):
        rows = torch.randn(3, 2, 6, generator=dice)
        flat = rows.flatten(1).double()
        want = torch.stack([projected_onto_the_dual_cone(row, flat) for row in flat]).mean(0).view(2, 6)
        assert relative_error(aggregate_gradients(rows, UPGrad(), 0).double(), want) < 1e-3


def test_rules_that_weigh_change_what_is_learned(tmp_path: Path) -> None:
    write_world(tmp_path)
    rules = {"mgda": MGDA(), "mean": Mean()}
    if find_spec("cvxpy"):
        rules["cagrad"] = CAGrad(c=0.5)
    ends = {
        name: fit_world(tmp_path, tmp_path / name, steps=3, combine=rule, objective=tm.Alignment())
        for name, rule in rules.items()
    }
    values = {name: module.coefficients().detach() for name, module in ends.items()}
    for name, end in values.items():
        assert (end - ends[name].start).abs().max() > 1e-3
        assert name == "mean" or (end - values["mean"]).abs().max() > 1e-4


def test_a_projected_gradient_is_exact_in_float64(random_task_vectors, tiny_mlp) -> None:
    """<(1 - U U^T) dL/dW, tau_k> by autograd through the merge."""
    module = tiny_mlp.double()
    given = random_task_vectors(module, [Difference, LowRank, ExpertWeight])
    coefficients = Coefficients(given.experts, Grouping("tensor").layout(given.shapes)).double()
    merged = MergedModel(module, given, coefficients)
    merged.subspaces = {
        name: shared_subspace(delta.dense(), 2)
        for name, delta in given.deltas.items()
        if len(delta.shape) == 2
    }
    assert sum(basis.shape[1] for basis in merged.subspaces.values()) == 4
    merged.materialise()
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    slopes = torch.autograd.grad(module(x).square().sum(), list(merged.parameters.values()))
    module(x).square().sum().backward()
    got = merged.gradient()
    for column, (name, slope) in enumerate(zip(merged.parameters, slopes, strict=True)):
        if name in merged.subspaces:
            basis = merged.subspaces[name]
            slope = (torch.eye(len(basis), dtype=torch.float64) - basis @ basis.T) @ slope
        want = (given.deltas[name].dense() * slope).reshape(3, -1).sum(1)
        torch.testing.assert_close(got[:, column], want, rtol=1e-10, atol=1e-12)


OBJECTIVES = {
    "entropy": tm.Entropy(agreement=2.0),
    "alignment": tm.Alignment(hidden=0.5, layers=(0, 1, -1)),
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_what_is_shared_counts_for_nothing(objective: tm.Objective, tmp_path: Path) -> None:
    """<(1 - U U^T) G, tau> with G from plain autograd and U from the experts' leading singular vectors."""
    merge = languages_recipe(write_languages(tmp_path))
    data = tm.Calibration(calibration_files(merge), merge.base, max_length=16)
    module = tm.MergeModule(merge, objective, subspace=4, workspace=str(tmp_path / "w"))
    module.load(data)
    merged = module.resident.merged
    merged.materialise()
    encoded = data.tokenize.encode(data.examples[0])
    batch = Batch(0, encoded.inputs, encoded.mask, torch.arange(6))
    slopes = torch.autograd.grad(module.loss(batch), list(merged.parameters.values()))
    assert not merged.gradient().any()
    module.loss(batch).backward()
    got = merged.gradient()
    for column, (name, slope) in enumerate(zip(merged.parameters, slopes, strict=True)):
        taus = module.opened.task_vectors.deltas[name].dense()
        if slope.dim() == 2:
            basis = shared_subspace(taus, min(slope.shape) // 4)
            assert basis.shape == (len(slope), min(slope.shape) // 4)
            slope, basis = slope.double(), basis.double()
            slope = slope - basis @ (basis.T @ slope)
        want = (taus.double() * slope).flatten(1).sum(1)
        torch.testing.assert_close(got[:, column].double(), want, rtol=1e-3, atol=1e-6)
    (kept,) = (tmp_path / "w").glob("subspaces-*.safetensors")
    written = kept.stat().st_mtime_ns
    again = tm.MergeModule(merge, objective, subspace=4, workspace=str(tmp_path / "w"))
    again.load(data)
    assert kept.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="subspace must be 0 or more"):
        tm.MergeModule(merge, subspace=-1)
