"""Closed forms against references in float64, and each one's identities at its native coefficients.

What is true of all of them is in `test_methods`.

Legend: `K` experts, `m x n` a matrix.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import trainmerge as tm
from tests.contracts import relative_error
from tests.methods import matrices, one, random, run, vectors
from tests.world import recipe, write_world
from trainmerge.preprocess import doge
from trainmerge.preprocess.consensus import tall_masks
from trainmerge.preprocess.spectrum import input_directions, polar, truncated
from trainmerge.preprocess.subspace import shared_subspace
from trainmerge.run.recipe_files import calibration_files
from trainmerge.task_vectors.delta import TaskVectors


def test_dare_is_unbiased_and_its_dice_know_only_names() -> None:
    tau = torch.full((1, 200, 500), 2.0**-8, dtype=torch.float64)
    (kept,) = one(tm.Dare(0.9), tau[0])
    share = (kept != 0).double().mean().item()
    assert share == pytest.approx(0.1, abs=0.004)
    assert kept.unique().tolist() == pytest.approx([0.0, 10 * 2.0**-8])
    alone, beside = run(tm.Dare(0.5), {"w": tau}), run(tm.Dare(0.5), {"v": tau, "w": tau})
    assert torch.equal(alone["w"], beside["w"])
    assert not torch.equal(beside["v"], beside["w"])
    assert not torch.equal(one(tm.Dare(0.5, seed=1), tau[0]), alone["w"])


def test_dare_speaks_up_for_large_differences() -> None:
    taus = {"w": torch.stack([torch.full((9000, 3), size, dtype=torch.float64) for size in (0.004, 0.2)])}
    with pytest.warns(UserWarning, match=r"\{'b': '0\.2'\}.*10 times"):
        run(tm.Dare(0.9), taus)
    run(tm.Dare(0.5), taus)  # not under -W error


def test_dare_has_its_variance_and_a_layer_its_output_on_average() -> None:
    tau, x = 1e-3 * matrices(0, shape=(4, 6))[0], matrices(1, shape=(6, 1))[0]
    kept = torch.stack([one(tm.Dare(0.9, seed=s), tau)[0] for s in range(600)])
    variance = (kept - tau).square().mean(0) / tau.square()
    assert variance.mean().item() == pytest.approx(9.0, rel=0.1)  # p / (1 - p)
    spread = (9 * tau.square() @ x.square() / 600).sqrt()
    assert ((kept @ x).mean(0) - tau @ x).abs().div(spread).max() < 4.5
    taus = random()
    assert all(torch.equal(got, taus[name]) for name, got in run(tm.Dare(0.0), taus).items())


def test_breadcrumbs_drop_both_ends() -> None:
    tau = torch.tensor([[5.0, -9.0, 1.0, 3.0, -7.0, 2.0, 0.5, -4.0, 8.0, 6.0]], dtype=torch.float64)
    (got,) = one(tm.Breadcrumbs(0.4, 0.2), tau)
    assert got.tolist() == [[5.0, 0, 0, 0, -7.0, 0, 0, -4.0, 0, 6.0]]
    (wide,) = matrices(0, shape=(30, 40))
    ranks = wide.abs().flatten().argsort(descending=True).argsort().view(wide.shape)
    want = torch.where((ranks >= 8) & (ranks < 8 + 180), wide, 0.0)  # floor(0.007 n), floor(0.15 n)
    assert torch.equal(one(tm.Breadcrumbs(), wide)[0], want)
    ties = run(tm.Ties(0.4, scope="parameter"), {"w": tau[None]})["w"]
    assert torch.equal(run(tm.Breadcrumbs(0.4, 0.0), {"w": tau[None]})["w"], ties)


def test_consensus() -> None:
    a, b = matrices(1, 2)
    a[:3], b[3:] = 0, 0
    assert not one(tm.Consensus(agree=2), a, b).any()  # disjoint: nobody agrees
    assert torch.equal(one(tm.Consensus(agree=0), a, b), torch.stack([a, b]))
    assert torch.equal(one(tm.Consensus(agree=1), a, b), torch.stack([a, b]))
    assert not one(tm.Consensus(agree=3), a, b).any()
    same = torch.stack([a] * 3)
    assert torch.equal(tall_masks(same, torch.full((3,), 0.4)), same != 0)
    assert not tall_masks(torch.stack([a, a]), torch.ones(2)).any()  # strictly more
    with pytest.raises(ValueError, match="3 values for 2 experts"):
        one(tm.Consensus(threshold=[0.1, 0.2, 0.3]), a, b)


def test_consensus_is_its_formula_an_entry_at_a_time() -> None:
    taus, thresholds = torch.stack(matrices(0, 1, 2, 3)), [0.2, 0.3, 0.4, 0.6]
    got = one(tm.Consensus(3, thresholds), *taus)
    for row, column in torch.cartesian_prod(torch.arange(6), torch.arange(8)).tolist():
        entries = taus[:, row, column].tolist()
        needed = [abs(t) > h * abs(sum(entries) - t) for t, h in zip(entries, thresholds, strict=True)]
        kept = entries if sum(needed) >= 3 else [0.0] * 4
        assert got[:, row, column].tolist() == kept
    assert 0 < (got[0] != 0).sum() < got[0].numel()


def low_rank(columns: slice) -> Tensor:
    """A 12 x 12 matrix of rank 3, orthogonal to those of other columns."""
    basis = torch.linalg.qr(matrices(3, shape=(12, 12))[0])[0]
    other = torch.linalg.qr(matrices(4, shape=(12, 12))[0])[0]
    size = len(range(*columns.indices(12)))
    return (
        basis[:, columns] @ torch.diag(torch.arange(1.0, size + 1, dtype=torch.float64)) @ other[:, columns].T
    )


def test_tsv_leaves_orthogonal_low_rank_experts_alone() -> None:
    a, b = low_rank(slice(0, 3)), low_rank(slice(3, 6))
    torch.testing.assert_close(one(tm.Tsv(), a, b), torch.stack([a, b]), rtol=1e-9, atol=1e-9)


def test_tsv_makes_singular_vectors_orthogonal_and_keeps_the_values() -> None:
    taus = matrices(0, 1, shape=(8, 10))
    results = one(tm.Tsv(), *taus)
    kept = torch.cat([torch.linalg.svdvals(tau)[:4] for tau in taus]).sort(descending=True).values
    torch.testing.assert_close(torch.linalg.svdvals(results.sum(0)), kept)
    assert (results[0].T @ results[1]).abs().max() < 1e-9
    truncated = one(tm.Tsv(orthogonal=False), *taus)
    for tau, result in zip(taus, truncated, strict=True):
        u, s, v = torch.linalg.svd(tau)
        torch.testing.assert_close(result, u[:, :4] * s[:4] @ v[:4])


@pytest.mark.parametrize("shape", [(9, 12), (14, 6), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tsv_is_its_formula_by_lapack(shape: tuple[int, int], dtype: torch.dtype) -> None:
    taus = [tau.to(dtype) for tau in matrices(0, 1, 2, shape=shape)]
    rank = min(shape) // 3
    parts = [torch.linalg.svd(tau.double(), full_matrices=False) for tau in taus]
    left, right = (
        torch.linalg.svd(torch.cat(sides, 1), full_matrices=False)
        for sides in ([u[:, :rank] for u, _, _ in parts], [vh[:rank].T for _, _, vh in parts])
    )
    values = torch.cat([s[:rank] for _, s, _ in parts])
    want = (left[0] @ left[2] * values) @ (right[0] @ right[2]).T
    got = dict(tm.Tsv()(narrow(taus)))["w"]
    assert got.dtype == dtype
    assert relative_error(got.double().sum(0), want) < (1e-10 if dtype == torch.float64 else 1e-5)


def narrow(taus: Sequence[Tensor]) -> TaskVectors:
    """One matrix, in its own dtype."""
    given = vectors({"w": torch.stack(list(taus))})
    base = given.deltas["w"].base.to(taus[0].dtype)
    return TaskVectors(given.experts, {"w": replace(given.deltas["w"], base=base)})


def test_tsv_of_twins() -> None:
    """Equal experts are one of them; the difference of nearly equal ones gets a whole expert's weight."""
    (a,), (noise,) = matrices(0, shape=(20, 20)), matrices(1, shape=(20, 20))
    with pytest.warns(UserWarning, match=r"a and b are nearly equal \(cosine 1.000\)"):
        torch.testing.assert_close(one(tm.Tsv(1.0), a, a).sum(0), a)
    with pytest.warns(UserWarning, match="nearly equal"):
        near = one(tm.Tsv(0.5), a, a + 1e-4 * noise).sum(0)
    one(tm.Tsv(0.5, orthogonal=False), a, a)  # which minds no twins
    u, s, vh = torch.linalg.svd(a)
    signal = u[:, :10] * s[:10] @ vh[:10]
    assert ((near - signal).norm() / signal.norm()).item() == pytest.approx(1.0, abs=0.1)


def test_tsv_averages_what_is_no_matrix_and_what_is_left_out() -> None:
    taus = random()
    got = run(tm.Tsv(exclude=["wide.*"]), taus)
    for name in ("layer.bias", "wide.weight"):
        assert torch.equal(got[name], taus[name] / 3)
    assert not torch.equal(got["layer.weight"], taus["layer.weight"] / 3)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_truncated_triples_are_lapacks_down_to_the_smallest(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Six decades of singular values; what is squared loses the digits that the docstring says."""
    bases = [torch.linalg.qr(m)[0] for m in (*matrices(0, shape=(60, 40)), *matrices(1, shape=(40, 40)))]
    tall = bases[0] * torch.logspace(0, -5.9, 40, dtype=torch.float64) @ bases[1].T
    matrix = (tall if shape[0] > shape[1] else tall.T).to(dtype)
    u, s, v = (part.double() for part in truncated(matrix, 40))
    want = torch.linalg.svd(matrix.double(), full_matrices=False)
    off = (s / want[1] - 1).abs()
    assert len(s) == 40
    own, exact = 60 * torch.finfo(dtype).eps, 60 * torch.finfo(torch.float64).eps  # sums of up to 60 terms
    smallest = (want[1] / want[1][0]).square()
    assert (off < exact / smallest + own).all()
    for side in (u, v):
        apart = (side.T @ side - torch.eye(40).double()).abs()
        assert apart.max() < exact / smallest[-1] + own
        assert apart[:20, :20].max() < exact / smallest[19] + own
    assert relative_error((u * s) @ v.T, matrix) < own
    few = truncated(matrix, 7)
    assert [tuple(part.shape) for part in few] == [(shape[0], 7), (7,), (shape[1], 7)]


def test_no_triples_of_nothing_and_the_numerical_rank_of_little() -> None:
    for matrix in (torch.zeros(5, 3), torch.zeros(3, 5)):
        u, s, v = truncated(matrix, 3)
        assert (u.shape[1], len(s), v.shape[1]) == (0, 0, 0)
        assert not polar(matrix).any()
    assert len(truncated(low_rank(slice(0, 3)).float(), 12)[1]) == 3


def wudi_loss(merged: Tensor, taus: Sequence[Tensor]) -> Tensor:
    return sum(((merged - t) @ t.T).square().sum() / t.square().sum() for t in taus)


def test_wudi_goes_to_the_minimum_of_its_loss() -> None:
    taus = matrices(0, 1, 2, shape=(10, 4))
    merged = one(tm.Wudi(1e9), *taus).sum(0)
    merged.requires_grad_()
    (gradient,) = torch.autograd.grad(wudi_loss(merged, taus), merged)
    assert gradient.abs().max() < 1e-9
    start = sum(taus)
    assert wudi_loss(merged, taus) < wudi_loss(start, taus)
    assert torch.equal(one(tm.Wudi(0.0), *taus).sum(0), torch.stack(taus).sum(0))


def wudi_system(taus: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """C and D of half the loss's gradient, W C - D."""
    return (
        sum(t.T @ t / t.square().sum() for t in taus),
        sum(t @ t.T @ t / t.square().sum() for t in taus),
    )


def flow(start: Tensor, system: tuple[Tensor, Tensor], time: float) -> Tensor:
    """Where dW/dt = D - W C ends, by the exponential of the affine map: exact, singular C or not."""
    c, d = system
    n = len(c)
    block = torch.zeros(n + len(d), n + len(d), dtype=torch.float64)
    block[:n, :n], block[n:, :n] = -c, d
    moved = torch.linalg.matrix_exp(time * block)
    return start @ moved[:n, :n] + moved[n:, :n]


@pytest.mark.parametrize("shape", [(5, 4), (4, 5), (2, 9)])
def test_wudi_is_its_gradient_flow(shape: tuple[int, int]) -> None:
    taus = matrices(0, 1, shape=shape)
    got = one(tm.Wudi(2.0), *taus).sum(0)
    torch.testing.assert_close(got, flow(sum(taus), wudi_system(taus), 2.0), rtol=1e-9, atol=1e-9)
    end = one(tm.Wudi(1e12), *taus).sum(0)
    c, d = wudi_system(taus)
    inside = torch.linalg.pinv(c, hermitian=True)
    outside = sum(taus) - sum(taus) @ inside @ c  # what no expert reads stays as it was
    torch.testing.assert_close(end, d @ inside + outside, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("shape", [(12, 8), (3, 40)])
def test_wudi_filters_as_many_directions_as_it_says(shape: tuple[int, int]) -> None:
    taus = matrices(0, 1, shape=shape)
    c, d = wudi_system(taus)
    values, directions = (part.flip(-1) for part in torch.linalg.eigh(c))
    values = values.clamp_min(0)

    def filtered(passed: Tensor) -> Tensor:
        onto = directions * passed @ directions.T
        inverse = directions * torch.where(passed > 0, passed / values.clamp_min(1e-12), 0.0) @ directions.T
        return sum(taus) - sum(taus) @ onto + d @ inverse

    order, solid = torch.arange(shape[1]), values > 1e-12
    swudi = -torch.expm1(-1300.0 * values) * (order < -(-65 * shape[1] // 100)) * solid
    adaptive = order < torch.ceil(values.sqrt().sum().square() / values.sum() - 1e-6)
    for method, passed in ((tm.Wudi(1300.0, keep=0.65), swudi), (tm.Wudi(), adaptive.double())):
        torch.testing.assert_close(one(method, *taus).sum(0), filtered(passed), rtol=1e-7, atol=1e-8)


def test_directions_of_what_is_read_by_the_smaller_side() -> None:
    for shape in ((4, 30), (30, 4)):
        taus = torch.stack(matrices(0, 1, shape=shape))
        taus[1] *= 1e-3
        values, directions = input_directions(taus)
        c, _ = wudi_system(taus)
        torch.testing.assert_close(directions * values @ directions.T, c, rtol=1e-9, atol=1e-12)
        assert len(values) == min(shape[1], 2 * shape[0])
    assert len(input_directions(torch.zeros(2, 3, 4))[0]) == 0


def test_opcm() -> None:
    a, b = matrices(0, 1)
    same = one(tm.Opcm(), a, a)
    assert same[1].norm() < 1e-12 * a.norm()  # what is known is not added again
    torch.testing.assert_close(same[0], a)
    results = one(tm.Opcm(), a, b)
    assert (results[0] * results[1]).sum().abs() < 1e-9
    mean = (a.norm() + b.norm()) / 2
    torch.testing.assert_close(results.sum(0).norm(), mean)
    left, right = low_rank(slice(0, 3)), low_rank(slice(3, 6))
    apart = one(tm.Opcm(), left, right).sum(0)
    torch.testing.assert_close(apart / apart.norm(), (left + right) / (left + right).norm())


def streamed_opcm(taus: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """As the paper has it: an expert at a time, full factorisations, the whole model rescaled every time."""
    norm = lambda model: torch.cat([t.flatten() for t in model.values()]).norm()  # noqa: E731
    merged = {name: tau[0] for name, tau in taus.items()}
    size, norms = 1.0, [norm(merged)]
    for k in range(1, len(next(iter(taus.values())))):
        total = {}
        for name, tau in taus.items():
            total[name] = size * merged[name] + (
                tau[k] if tau.dim() != 3 else apart(merged[name], tau[k], alpha)
            )
        norms.append(norm({name: tau[k] for name, tau in taus.items()}))
        size = float(norm(total) / torch.stack(norms).mean())
        merged = {name: t / size for name, t in total.items()}
    return merged


def apart(merged: Tensor, tau: Tensor, alpha: float) -> Tensor:
    u, s, vh = torch.linalg.svd(merged)
    split = int((s.cumsum(0) / s.sum() > alpha).int().argmax())
    inner = u.T @ tau @ vh.T
    inner.fill_diagonal_(0)
    inner[:split, :split] = 0
    return u @ inner @ vh


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_opcm_is_its_stream(alpha: float) -> None:
    taus = random(4)
    want = streamed_opcm(taus, alpha)
    for name, results in run(tm.Opcm(alpha), taus).items():
        torch.testing.assert_close(results.sum(0), want[name])


def optmerge_loss(merged: Tensor, taus: Sequence[Tensor]) -> Tensor:
    """As the paper has it: |(W - t_k) (S_k V_k^T)^T|^2 / |tau_k|^2."""
    mean, rank = sum(taus) / len(taus), min(taus[0].shape) // len(taus)
    total = torch.zeros((), dtype=torch.float64)
    for tau in taus:
        u, s, v = torch.linalg.svd(tau - mean, full_matrices=False)
        target = u[:, :rank] * s[:rank] @ v[:rank] + mean
        _, s, v = torch.linalg.svd(tau, full_matrices=False)
        total = (
            total + ((merged - target) @ (s[:rank, None] * v[:rank]).T).square().sum() / tau.square().sum()
        )
    return total


@pytest.mark.parametrize("start", ["sum", "mean"])
def test_optmerge_is_its_gradient_flow_and_ends_at_the_minimum(start: str) -> None:
    taus = matrices(0, 1, shape=(8, 6))
    end = one(tm.OptMerge(float("inf"), start), *taus).sum(0).requires_grad_()
    (slope,) = torch.autograd.grad(optmerge_loss(end, taus), end)
    assert slope.abs().max() < 1e-9
    merged = torch.stack(taus).sum(0) if start == "sum" else torch.stack(taus).mean(0)
    torch.testing.assert_close(one(tm.OptMerge(0.0, start), *taus).sum(0), merged)
    torch.testing.assert_close(
        one(tm.OptMerge(2.0, start), *taus).sum(0),
        flow(merged, optmerge_system(taus), 2.0),
        rtol=1e-9,
        atol=1e-9,
    )


def optmerge_system(taus: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """C and D of half the loss's gradient: it is quadratic, so its slopes at zero and at units have them."""
    shape = taus[0].shape
    slope = lambda w: torch.autograd.functional.jacobian(lambda x: optmerge_loss(x, taus) / 2, w)  # noqa: E731
    at_zero = slope(torch.zeros(shape, dtype=torch.float64))
    rows = torch.zeros(shape[1], *shape, dtype=torch.float64)
    rows[torch.arange(shape[1]), 0, torch.arange(shape[1])] = 1
    return torch.stack([(slope(row) - at_zero)[0] for row in rows]), -at_zero


def test_slerp_goes_along_the_circle() -> None:
    torch.manual_seed(0)
    taus = {"w": torch.randn(2, 6, 8, dtype=torch.float64), "v": torch.zeros(2, 5, dtype=torch.float64)}
    given = vectors(taus)
    first, second = given.deltas["w"].base + taus["w"]
    at = lambda t: given.deltas["w"].base + dict(tm.Slerp(t)(given))["w"].sum(0)  # noqa: E731
    torch.testing.assert_close(at(0.0), first)
    torch.testing.assert_close(at(1.0), second)
    angle = torch.acos((first * second).sum() / first.norm() / second.norm())
    middle = at(0.5)
    torch.testing.assert_close(middle, (first + second) / (2 * torch.cos(angle / 2)))
    torch.testing.assert_close(at(0.25) * 2 * torch.cos(angle / 4), first + middle)
    assert not dict(tm.Slerp()(given))["v"].any()  # equal models stay
    with pytest.raises(ValueError, match="two experts, not 3"):
        run(tm.Slerp(), random())


def test_model_stock_is_where_the_altitudes_meet() -> None:
    """Of the triangle of base and two experts, as the paper draws it."""
    a, b = matrices(0, 1)
    b = (0.5 * a + b) * a.norm() / (0.5 * a + b).norm()
    merged = one(tm.ModelStock(), a, b).sum(0)
    for expert, other in ((a, b), (b, a)):
        torch.testing.assert_close((merged * expert).sum(), (other * expert).sum())
    torch.testing.assert_close(one(tm.ModelStock(), a, a).sum(0), a)
    assert not one(tm.ModelStock(), a, -a).any()
    with pytest.raises(ValueError, match="at least two experts"):
        one(tm.ModelStock(), a)


def gap(merged: Tensor, taus: Tensor) -> Tensor:
    return ((taus * (taus - merged)).sum(2) ** 2).sum()


def test_doge_closes_the_gap_outside_of_what_is_shared() -> None:
    taus = torch.stack(matrices(0, 1, 2, shape=(12, 16)))
    weights = 0.07 / taus.flatten(1).norm(dim=1)
    start = torch.einsum("k,kmn->mn", weights, taus)
    merged = one(tm.Doge(density=1.0), *taus).sum(0)
    basis = shared_subspace(taus, 2)
    assert (basis.T @ (merged - start)).abs().max() < 1e-9
    torch.testing.assert_close(basis.T @ basis, torch.eye(2, dtype=torch.float64))
    assert gap(merged, taus) < 0.9 * gap(start, taus)
    slopes = []
    for point in (start, merged):
        point.requires_grad_()
        (slope,) = torch.autograd.grad(gap(point, taus), point)
        slopes.append((slope - basis @ (basis.T @ slope)).norm())
    assert slopes[1] < 1e-7 * slopes[0]  # the least there is, under the constraint


@pytest.mark.parametrize("shape", [(12, 16), (16, 12), (12, 2)])  # the last has more equations than unknowns
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_doge_is_its_dense_least_squares(shape: tuple[int, int], density: float) -> None:
    taus = torch.stack(matrices(0, 1, 2, shape=shape))
    weights = 0.07 / taus.flatten(1).norm(dim=1)
    start = torch.einsum("k,kmn->mn", weights, taus)
    basis = shared_subspace(taus, min(shape) // 6)
    free = torch.linalg.qr(basis, mode="complete")[0][:, basis.shape[1] :]  # [m, m - k]
    system = torch.einsum("mf,kmn->kmfn", free, taus).reshape(len(taus) * shape[0], -1)
    gaps = (taus * (taus - start)).sum(2).flatten()
    shortest = torch.linalg.lstsq(system, gaps, driver="gelsd").solution
    change = free @ shortest.view(-1, shape[1]) / weights.sum()
    count = int(density * taus[0].numel())
    masks = taus.abs() >= taus.abs().flatten(1).sort(descending=True).values[:, count - 1, None, None]
    want = weights[:, None, None] * masks * (taus + change)
    torch.testing.assert_close(one(tm.Doge(density=density), *taus), want, rtol=1e-6, atol=1e-8)


def test_the_papers_solver_of_doge_goes_the_same_way_and_leaves_the_complement() -> None:
    taus = 0.01 * torch.stack(matrices(0, 1, 2, shape=(12, 16)))
    weights = 0.07 / taus.flatten(1).norm(dim=1)
    start = torch.einsum("k,kmn->mn", weights, taus)
    moved = [one(tm.Doge(density=1.0, solver=s), *taus).sum(0) - start for s in ("cg", "adam")]
    assert gap(start + moved[1], taus) < gap(start, taus)
    assert gap(start + moved[0], taus) < gap(start + moved[1], taus)
    basis = shared_subspace(taus, 2)
    outside, inside = ((basis.T @ m).norm() / m.norm() for m in moved)
    assert outside < 1e-9
    assert inside > 0.01


def by_adam(taus: Tensor, eta: float, directions: int, steps: int, separate: bool) -> Tensor:
    """The paper's solver, written out: dense projector, slopes by hand, Adam's own recursion."""
    K = len(taus)
    weights = eta / taus.flatten(1).norm(dim=1)
    rank = min(taus.shape[1:]) // K
    leading = torch.cat([torch.linalg.svd(tau)[0][:, :rank] for tau in taus], dim=1)
    basis = torch.linalg.svd(leading)[0][:, :directions]
    away = torch.eye(len(basis), dtype=torch.float64) - basis @ basis.T
    moves = torch.zeros_like(taus) if separate else torch.zeros_like(taus[:1])
    shares = weights if separate else weights.sum()[None]
    first, second = torch.zeros_like(moves), torch.zeros_like(moves)
    for step in range(1, steps + 1):
        merged = sum(weights[j] * taus[j] for j in range(K)) + sum(
            share * move for share, move in zip(shares, moves, strict=True)
        )
        slope = torch.zeros_like(taus[0])  # of the gap with respect to the merged matrix
        for tau in taus:
            for row in range(len(tau)):
                slope[row] -= 2 * (tau[row] @ (tau[row] - merged[row])) * tau[row]
        for s, share in enumerate(shares):
            projected = away @ (share * slope)
            first[s] = 0.9 * first[s] + 0.1 * projected
            second[s] = 0.999 * second[s] + 0.001 * projected**2
        unbiased = first / (1 - 0.9**step), second / (1 - 0.999**step)
        moves = moves - doge.PAPER_RATE * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
    return moves.expand_as(taus)


@pytest.mark.parametrize("separate", [False, True], ids=["DOGE-TA", "DOGE-AM"])
def test_the_papers_solver_of_doge_is_its_own_steps(separate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doge, "PAPER_STEPS", 12)
    taus = torch.stack(matrices(0, 1, 2, shape=(12, 16)))
    changes = by_adam(taus, 0.07, 4, 12, separate)
    count = int(0.3 * taus[0].numel())
    masks = taus.abs() >= taus.abs().flatten(1).sort(descending=True).values[:, count - 1, None, None]
    scales = torch.ones(3, dtype=torch.float64) if separate else 0.07 / taus.flatten(1).norm(dim=1)
    want = scales[:, None, None] * masks * (taus + changes)
    got = one(tm.Doge(solver="adam", separate=separate, subspace=3), *taus)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert (changes.abs().amax(dim=(1, 2)) > 5e-4).all()


def test_doge_masks_by_the_original_and_leaves_the_rest_to_the_base() -> None:
    taus = random()
    got = run(tm.Doge(density=0.25, exclude=["wide.*"]), taus)
    for k in range(3):
        magnitude, kept = taus["layer.weight"][k].abs().flatten(), got["layer.weight"][k].flatten() != 0
        assert kept.sum() == 12
        assert magnitude[kept].min() > magnitude[~kept].max()
    assert not any(got[name].any() for name in taus if name != "layer.weight")
    assert not run(tm.Doge(exclude=["layer.*"]), taus)["layer.weight"].any()


def flat_pcb(taus: Tensor, density: float) -> tuple[Tensor, Tensor]:
    """Clipped differences and shares by sorting, [K, n] each."""
    size = taus.shape[1]
    ordered = taus.abs().sort(dim=1, descending=True).values
    outliers = int(0.01 * size)
    high, low = ordered[:, [outliers]], ordered[:, [size - outliers - 1]]
    clipped = taus.sign() * taus.abs().clamp(low, high)
    z = taus.sign() * (clipped.abs() - low) / (high - low)
    scores = torch.exp(len(taus) * z**2) * torch.tanh(z[:, None] * z[None]).sum(1)
    last = scores.clamp_min(0).sort(dim=1, descending=True).values[:, [int(density * size)]]
    return clipped, ((scores - last) / (scores.amax(1, keepdim=True) - last)).clamp_min(0)


def test_pcb_is_its_formula_on_the_flat_vectors() -> None:
    torch.manual_seed(0)
    taus = {"a": torch.randn(3, 20, 30, dtype=torch.float64), "b": 0.1 * torch.randn(3, 50).double()}
    got = run(tm.Pcb(0.2), taus)
    clipped, shares = flat_pcb(torch.cat([t.flatten(1) for t in taus.values()], dim=1), 0.2)
    want = shares * clipped / shares.sum(0).clamp_min(1e-12)
    torch.testing.assert_close(torch.cat([got[n].flatten(1) for n in taus], 1), want, rtol=1e-4, atol=1e-5)
    assert ((want != 0).sum(1) <= 0.2 * want.shape[1]).all()
    merged = want.sum(0)  # inside the hull of the clipped ones and 0
    assert bool((merged <= clipped.amax(0).clamp_min(0) + 1e-12).all())
    assert bool((merged >= clipped.amin(0).clamp_max(0) - 1e-12).all())


def test_pcb_prefers_what_all_agree_on() -> None:
    taus = torch.linspace(0.1, 1.0, 60, dtype=torch.float64).repeat(3, 1)
    taus[:, 55] = taus[:, 54]  # of one size: here all agree, there one differs
    taus[2, 55] *= -1
    _, shares = flat_pcb(taus, 0.5)
    assert shares[0, 54] > shares[0, 55]
    got = run(tm.Pcb(0.5), {"w": taus})["w"]
    assert (got[:, 54] != 0).all()
    assert (got[:, 55] != 0).tolist() == [True, True, False]


def widen_scores(changes: Tensor, above: float, important: float) -> Tensor:
    """[K, n] -> weights: the published `compute_importance_scores`."""
    scores = changes.exp() / changes.exp().sum(0)
    return torch.where(changes > above * changes.mean(1, keepdim=True), important, scores)


def widen_ranks(changes: Tensor) -> Tensor:
    """[K, n] of numbers without ties -> ranks, one at a time."""
    return torch.stack([(row[:, None] > row[None]).sum(1).double() / len(row) for row in changes])


@pytest.mark.parametrize(("above", "important"), [(1.0, 1.0), (0.5, 2.0)])
def test_widen_is_its_formula(above: float, important: float) -> None:
    taus = {**random(), "model.embed_tokens.weight": torch.stack(matrices(3, 4, 5, shape=(10, 4)))}
    given = vectors(taus)
    got = dict(tm.Widen(above, important)(given))
    for name, tau in taus.items():
        if tau.dim() != 3:
            want = widen_scores(tau.abs().reshape(len(tau), -1), above, important).view(tau.shape) * tau
        else:
            inputs = 0 if name.endswith("embed_tokens.weight") else 1  # a token is an input
            base, models = given.deltas[name].base, given.deltas[name].base + tau
            outputs = 1 - inputs
            longer = (models.norm(dim=1 + outputs) - base.norm(dim=outputs)).abs()
            turned = 1 - (models * base).sum(1 + outputs) / models.norm(dim=1 + outputs) / base.norm(
                dim=outputs
            )
            weights = sum(widen_scores(widen_ranks(x), above, important) for x in (longer, turned)) / 2
            want = tau * weights.unsqueeze(1 + outputs)
        torch.testing.assert_close(got[name], want)


def test_widen_without_the_bonus_shares_equal_experts_out() -> None:
    (a,) = matrices(0)
    shared = one(tm.Widen(above=float("inf")), a, a)
    torch.testing.assert_close(shared.sum(0), a)
    assert one(tm.Widen(), a, a).sum(0).norm() > 1.2 * a.norm()  # the paper's overshoot


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: tm.Dare(1.0), "drop"),
        (lambda: tm.Breadcrumbs(0.0), "density"),
        (lambda: tm.Breadcrumbs(0.9, 0.2), "outliers"),
        (lambda: tm.Consensus(-1), "agree"),
        (lambda: tm.Tsv(0.0), "share"),
        (lambda: tm.Opcm(1.0), "alpha"),
        (lambda: tm.Pcb(0.0), "density"),
        (lambda: tm.Doge(eta=0.0), "eta"),
        (lambda: tm.Doge(density=0.0), "density"),
        (lambda: tm.Doge(separate=True), "early stop"),
        (lambda: tm.OptMerge(-1.0), "time"),
        (lambda: tm.Slerp(1.5), "t must"),
        (lambda: tm.Wudi(-1.0), "time"),
        (lambda: tm.Wudi(1.0, keep=0.0), "keep"),
    ],
)
def test_settings_that_mean_nothing(build: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


def test_a_fit_of_no_steps_is_the_closed_form(tmp_path: Path) -> None:
    write_world(tmp_path)
    experts = {
        name: tm.Expert(expert.path) for name, expert in recipe(tmp_path).experts.items()
    }  # no calibration data
    merge = recipe(tmp_path, experts=experts, preprocess=[tm.Dare(0.2), tm.Tsv()])
    module = tm.MergeModule(merge, initial=0.7, workspace=str(tmp_path / "run" / "workspace"))
    data = tm.Calibration(calibration_files(merge), merge.base)
    trainer = tm.make_trainer(tmp_path / "run", max_steps=0, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, data, trainer, tmp_path / "run")
    folder = tm.export_run(tmp_path / "run", tmp_path / "merged")
    got = load_file(folder / "model.safetensors")
    vectors_ = merge.open(tmp_path / "w").task_vectors
    for method in merge.preprocess:
        taus = dict(method(vectors_))
        vectors_ = vectors_.replaced(taus)
    for name, delta in vectors_.deltas.items():
        torch.testing.assert_close(got[name], delta.base + 0.7 * taus[name].sum(0), rtol=1e-6, atol=1e-6)
    more = tm.make_trainer(tmp_path / "more", max_steps=1, accelerator="cpu", enable_progress_bar=False)
    with pytest.raises(ValueError, match=r"\['mood', 'colour', 'animal'\] have no `calibration` file"):
        tm.fit(module, data, more, tmp_path / "more")
