"""Closed-form methods: what is true of all of them, and each one's identities at its native coefficients.

Legend: `K` experts, `m x n` a matrix.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import trainmerge as tm
from tests.world import recipe, write_world
from trainmerge.kernels import Difference
from trainmerge.preprocess import Piecewise, apply, in_pieces, piecewise
from trainmerge.preprocess.consensus import tall_masks
from trainmerge.preprocess.subspace import shared_subspace
from trainmerge.recipe import calibration_files
from trainmerge.task_vectors import Delta, TaskVectors

METHODS = {
    "breadcrumbs": tm.Breadcrumbs(0.5, 0.1),
    "consensus": tm.Consensus(),
    "dare": tm.Dare(0.5),
    "doge": tm.Doge(density=0.5),
    "doge-am": tm.Doge(density=0.5, solver="adam", separate=True),
    "model-stock": tm.ModelStock(),
    "opcm": tm.Opcm(),
    "optmerge": tm.OptMerge(),
    "optmerge-mean": tm.OptMerge(start="mean"),
    "pcb": tm.Pcb(0.3),
    "ties": tm.Ties(0.5),
    "tsv": tm.Tsv(),
    "tsv-c": tm.Tsv(orthogonal=False),
    "widen": tm.Widen(),
    "wudi": tm.Wudi(300.0),
    "aswudi": tm.Wudi(),
}
SHAPES = {"layer.weight": (6, 8), "layer.bias": (6,), "norm.weight": (8,), "scale": ()}


def vectors(taus: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> TaskVectors:
    """Task vectors with these differences, [K, *S] a parameter."""
    torch.manual_seed(9)
    count = len(next(iter(taus.values())))
    deltas = {
        name: Delta(torch.randn(tau.shape[1:]).to(dtype), tuple(Difference(t.to(dtype)) for t in tau))
        for name, tau in taus.items()
    }
    return TaskVectors(tuple("abcdef"[:count]), deltas)


def random(count: int = 3, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(count, *shape, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


def run(
    method: tm.Preprocess, taus: dict[str, Tensor], dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    return dict(method(vectors(taus, dtype)))


def one(method: tm.Preprocess, *taus: Tensor) -> Tensor:
    """A single matrix's result, [K, m, n]."""
    return run(method, {"w": torch.stack(taus)})["w"]


def matrices(*seeds: int, shape: Sequence[int] = (6, 8)) -> list[Tensor]:
    return [
        torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in seeds
    ]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_shapes_order_dtype_and_repetition(method: tm.Preprocess) -> None:
    taus = random()
    got = run(method, taus)
    assert list(got) == list(taus)
    assert {name: tuple(t.shape) for name, t in got.items()} == {n: (3, *s) for n, s in SHAPES.items()}
    assert all(torch.equal(a, b) for a, b in zip(got.values(), run(method, taus).values(), strict=True))
    half = run(method, taus, torch.bfloat16)
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in half.values())


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if isinstance(method, Piecewise)])
def test_pieces_of_large_parameters_are_the_whole(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taus = {**random(), "more": torch.randn(3, 7, 2, 3, dtype=torch.float64)}
    whole_results = run(METHODS[name], taus)
    monkeypatch.setattr(piecewise, "PIECE", 16)
    pieces = [piece for n, delta in vectors(taus).deltas.items() for piece in in_pieces(n, delta)]
    assert [piece for _, piece, _ in pieces][:2] == ["layer.weight[0:2]", "layer.weight[2:4]"]
    assert max(part.shape.numel() for *_, part in pieces) <= 16
    got = apply(vectors(taus), [METHODS[name]], tmp_path, "inputs")
    if name == "dare":  # whose dice know the piece
        whole = {n: t.sum(0) * 0 for n, t in taus.items()}
        assert {n: d.shape for n, d in got.deltas.items()} == {n: t.shape for n, t in whole.items()}
        assert all(set((d.dense() / taus[n]).unique().tolist()) <= {0, 2} for n, d in got.deltas.items())
        return
    for parameter, result in run(METHODS[name], taus).items():
        assert torch.equal(got.deltas[parameter].dense(), whole_results[parameter])
        assert torch.equal(result, whole_results[parameter])


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_what_did_not_change_stays(method: tm.Preprocess) -> None:
    taus = {name: tau.clone() for name, tau in random().items()}
    for tau in taus.values():
        tau[1] = 0
    got = run(method, taus)
    if not isinstance(
        method, tm.Wudi | tm.OptMerge
    ):  # WUDI lets an absent expert's part of the sum go to the others
        assert not any(t[1].any() for t in got.values())
    nothing = run(method, {name: torch.zeros_like(tau) for name, tau in taus.items()})
    assert not any(t.any() for t in nothing.values())


@pytest.mark.parametrize(
    "name", sorted(METHODS.keys() - {"widen", "doge", "doge-am"})
)  # against the base; eta / |tau|
def test_scale(name: str) -> None:
    method = METHODS[name]
    got, scaled = run(method, random()), run(method, {n: 4.0 * t for n, t in random().items()})
    for name in got:
        torch.testing.assert_close(scaled[name], 4.0 * got[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"opcm", "dare"}))
def test_the_order_of_experts_does_not_matter(name: str) -> None:
    """But for OPCM, which goes by it, and DARE's dice, which know names."""
    taus, order = random(), [2, 0, 1]
    got = run(METHODS[name], taus)
    moved = run(METHODS[name], {n: t[order] for n, t in taus.items()})
    for parameter in got:
        torch.testing.assert_close(moved[parameter], got[parameter][order], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "method",
    [tm.Breadcrumbs(1.0, 0.0), tm.Consensus(agree=0), tm.Dare(0.0), tm.Opcm(), tm.OptMerge(),
     tm.Ties(1.0), tm.Tsv(), tm.Widen(), tm.Wudi(300.0), tm.Wudi()],
    ids=lambda method: type(method).__name__,
)  # fmt: skip
def test_one_expert_is_itself(method: tm.Preprocess) -> None:
    taus = random(1)
    got = run(method, taus)
    for name in taus:
        torch.testing.assert_close(got[name], taus[name], rtol=1e-7, atol=1e-9)


def test_dare_is_unbiased_and_its_dice_know_only_names() -> None:
    tau = torch.ones(1, 200, 500, dtype=torch.float64)
    (kept,) = one(tm.Dare(0.9), tau[0])
    share = (kept != 0).double().mean().item()
    assert share == pytest.approx(0.1, abs=0.004)
    assert kept.unique().tolist() == pytest.approx([0.0, 10.0])
    alone, beside = run(tm.Dare(0.5), {"w": tau}), run(tm.Dare(0.5), {"v": tau, "w": tau})
    assert torch.equal(alone["w"], beside["w"])
    assert not torch.equal(beside["v"], beside["w"])
    assert not torch.equal(one(tm.Dare(0.5, seed=1), tau[0]), alone["w"])


def test_breadcrumbs_drop_both_ends() -> None:
    tau = torch.tensor([[5.0, -9.0, 1.0, 3.0, -7.0, 2.0, 0.5, -4.0, 8.0, 6.0]], dtype=torch.float64)
    (got,) = one(tm.Breadcrumbs(0.4, 0.2), tau)
    assert got.tolist() == [[5.0, 0, 0, 0, -7.0, 0, 0, -4.0, 0, 6.0]]
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


def test_tsv_averages_what_is_no_matrix() -> None:
    taus = random()
    assert torch.equal(run(tm.Tsv(), taus)["layer.bias"], taus["layer.bias"] / 3)


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


def test_wudi_is_its_gradient_flow() -> None:
    taus = matrices(0, 1, shape=(5, 4))
    merged = torch.stack(taus).sum(0).requires_grad_()
    time, steps = 2.0, 20000
    for _ in range(steps):  # Euler on half the gradient
        (gradient,) = torch.autograd.grad(wudi_loss(merged, taus) / 2, merged)
        merged = (merged - time / steps * gradient).detach().requires_grad_()
    torch.testing.assert_close(one(tm.Wudi(time), *taus).sum(0), merged.detach(), rtol=1e-3, atol=1e-3)


def test_wudi_keeps_as_many_directions_as_it_says() -> None:
    taus = matrices(0, 1, shape=(12, 8))
    total = sum(t.T @ t / t.square().sum() for t in taus)
    values, vectors_ = torch.linalg.eigh(total)
    leading = vectors_.flip(1)[:, : -(-13 * 8 // 20)]  # ceil(0.65 * 8)
    moved = one(tm.Wudi(1e9, keep=0.65), *taus).sum(0) - sum(taus)
    torch.testing.assert_close(moved, moved @ leading @ leading.T, rtol=1e-7, atol=1e-9)
    count = -(-(values.sqrt().sum() ** 2) // values.sum())
    adaptive = vectors_.flip(1)[:, : int(count)]
    moved = one(tm.Wudi(), *taus).sum(0) - sum(taus)
    torch.testing.assert_close(moved, moved @ adaptive @ adaptive.T, rtol=1e-7, atol=1e-9)


def test_opcm() -> None:
    a, b = matrices(0, 1)
    same = one(tm.Opcm(), a, a)
    assert same[1].norm() < 0.9 * same[0].norm()  # what is known is not added again
    results = one(tm.Opcm(), a, b)
    assert (results[0] * results[1]).sum().abs() < 1e-9
    mean = (a.norm() + b.norm()) / 2
    torch.testing.assert_close(results.sum(0).norm(), mean)
    left, right = low_rank(slice(0, 3)), low_rank(slice(3, 6))
    apart = one(tm.Opcm(), left, right).sum(0)
    torch.testing.assert_close(apart / apart.norm(), (left + right) / (left + right).norm())


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
    for _ in range(4000):  # Euler on half the gradient
        merged.requires_grad_()
        (slope,) = torch.autograd.grad(optmerge_loss(merged, taus) / 2, merged)
        merged = (merged - 2.0 / 4000 * slope).detach()
    torch.testing.assert_close(one(tm.OptMerge(2.0, start), *taus).sum(0), merged, rtol=2e-3, atol=2e-3)


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
    with pytest.raises(ValueError, match="two experts at least"):
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


def test_doge_masks_by_the_original_and_leaves_the_rest_to_the_base() -> None:
    taus = random()
    got = run(tm.Doge(density=0.25), taus)
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
