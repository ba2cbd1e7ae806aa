"""Identities and float64 references of the closed forms: entrywise, spectral, on the sphere, in small spaces.

Legend: `K` experts, `m x n` a matrix, `r` a rank.
"""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import trainmerge as tm
from tests.contracts import relative_error
from tests.merging.test_methods import merge
from tests.methods import matrices, one, run, vectors
from trainmerge.kernels import LowRank, Term, Untouched
from trainmerge.task_vectors.delta import Delta, TaskVectors
from trainmerge.task_vectors.sphere import length, tangent

BASE = matrices(9)[0]


def close(got: Tensor, want: Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=1e-11)


def merged(method: tm.Preprocess, *taus: Tensor) -> Tensor:
    """Base + sum of the results."""
    return BASE + dict(method(vectors({"w": torch.stack(taus)}, {"w": BASE})))["w"].sum(0)


def disjoint(count: int = 3) -> list[Tensor]:
    """Task vectors without a common entry."""
    owner = torch.arange(48).view(6, 8) % count
    return [tau * (owner == k) for k, tau in enumerate(matrices(*range(count)))]


# --- entry by entry --------------------------------------------------------------------------------


def test_localize_and_stitch_on_random_experts() -> None:
    """Of four experts at 10%: 34% of the entries are in a mask, 5% in several."""
    taus = matrices(0, 1, 2, 3, shape=(300, 400))
    got = one(tm.LocalizeAndStitch(0.1), *taus)
    count = (got != 0).sum(0)
    assert [(own != 0).sum() for own in got] == [12_000] * 4
    assert float((count > 0).double().mean()) == pytest.approx(1 - 0.9**4, abs=0.005)
    assert float((count > 1).double().mean()) == pytest.approx(0.0523, abs=0.003)
    for own, tau in zip(got, taus, strict=True):
        close(own, torch.where(own != 0, tau / count.clamp_min(1), 0.0))


def test_localize_and_stitch_without_overlap_and_with_equal_experts() -> None:
    close(one(tm.LocalizeAndStitch(1.0), *disjoint()).sum(0), sum(disjoint()))
    (tau,) = matrices(0)
    close(one(tm.LocalizeAndStitch(1.0), tau, tau, tau).sum(0), tau)


def test_localize_and_stitch_has_one_threshold_for_all_parameters() -> None:
    small, large = 1e-6 * matrices(0)[0][None], matrices(1)[0][None]
    got = run(tm.LocalizeAndStitch(0.5), {"small": small, "large": large})
    assert not got["small"].any()
    close(got["large"], large)


@pytest.mark.parametrize("method", [tm.Ram(), tm.MagMax()])
def test_what_one_expert_alone_changed_keeps_its_size(method: tm.Preprocess) -> None:
    close(one(method, *disjoint()), torch.stack(disjoint()))
    (tau,) = matrices(0)
    close(one(method, tau, tau), torch.stack([tau / 2, tau / 2]))


def overlapping() -> list[Tensor]:
    return [tau * (draw > 0.3) for tau, draw in zip(matrices(0, 1, 2), matrices(3, 4, 5), strict=True)]


def test_ram_is_what_mergekits_files_give() -> None:
    taus = overlapping()
    models = [BASE + tau for tau in taus]
    close(merged(tm.Ram(), *taus), merge("ram", BASE, models))
    plus = tm.Ram(rescale=0.3, limit=5.0, scope="parameter")
    close(merged(plus, *taus), merge("ramplus_tl", BASE, models, r=0.3, alpha=5.0))


def test_ram_plus_counts_over_all_parameters() -> None:
    """Two shared and two unique entries of the first expert over both parameters: factor 1 + 0.5 x 1."""
    first = torch.tensor([[[1.0, 1, 0]], [[1, 1, 0]]], dtype=torch.float64)
    taus = {"a": first, "b": torch.tensor([[[2.0, 2, 0]], [[0, 0, 4]]], dtype=torch.float64)}
    got = run(tm.Ram(rescale=0.5, limit=9.0), taus)
    close(got["a"], first / 2)
    close(got["b"], torch.tensor([[[3.0, 3, 0]], [[0, 0, 8]]]))  # 1 + 0.5 x 2 for the second expert
    limited = run(tm.Ram(rescale=0.5, limit=0.2), taus)
    close(limited["b"], taus["b"] * 1.1)


def test_magmax_is_the_largest() -> None:
    taus = torch.stack(matrices(0, 1, 2))
    largest = taus.abs().argmax(dim=0, keepdim=True)
    close(one(tm.MagMax(), *taus).sum(0), taus.gather(0, largest)[0])
    tied = one(tm.MagMax(), torch.tensor([[2.0, 1.0]]), torch.tensor([[-2.0, -3.0]]))
    close(tied, torch.tensor([[[1.0, 0.0]], [[-1.0, -3.0]]]))


def test_della_keeps_by_rank_and_is_unbiased() -> None:
    tau = torch.tensor([[0.1, -3.0, 2.0, -0.5, 1.0]], dtype=torch.float64)
    want = torch.tensor([[0.4, 0.6, 0.55, 0.45, 0.5]], dtype=torch.float64)
    close(tm.Della(0.5, 0.2).probabilities(tau), want)
    rows = tau.expand(4000, 5)
    draws = one(tm.Della(0.5, 0.2), rows)[0]
    close((draws != 0).double().mean(0), want[0], rtol=0.1)  # four standard deviations
    assert relative_error(draws.mean(0), tau[0]) < 0.06  # of which one is 0.014
    with pytest.raises(ValueError, match="probabilities from"):
        tm.Della(0.1, 0.4)


@pytest.mark.parametrize("select", [1.0, 0.4])
def test_sce_is_what_mergekits_files_give(select: float) -> None:
    taus = matrices(0, 1, 2)
    close(merged(tm.Sce(select), *taus), merge("sce", BASE, [BASE + t for t in taus], select_topk=select))


# --- spectral --------------------------------------------------------------------------------------


def low_rank(*seeds: int, rank: int = 2, shape: tuple[int, int] = (12, 16)) -> list[Tensor]:
    ups = matrices(*seeds, shape=(shape[0], rank))
    downs = matrices(*(s + 50 for s in seeds), shape=(rank, shape[1]))
    return [up @ down for up, down in zip(ups, downs, strict=True)]


def iso_cts(taus: Tensor, share: float) -> Tensor:
    """The published computation, with full factorisations."""
    smaller, count = min(taus.shape[1:]), len(taus)
    own = round((smaller - int(smaller * share)) / count)
    common = smaller - own * count
    u, s, vh = torch.linalg.svd(taus.sum(0), full_matrices=False)
    u, s, vh = u[:, :common], s[:common], vh[:common]
    parts = [torch.linalg.svd(tau - u @ u.T @ tau, full_matrices=False) for tau in taus]
    left = torch.cat([*(p[0][:, :own] for p in parts), u], dim=1)
    right = torch.cat([*(p[2][:own] for p in parts), vh])
    values = torch.cat([*(p[1][:own] for p in parts), s])
    a, _, b = torch.linalg.svd(left, full_matrices=False)
    c, _, d = torch.linalg.svd(right, full_matrices=False)
    return values.mean() * (a @ b) @ (c @ d)


def test_iso_c_gives_all_directions_the_mean_singular_value() -> None:
    taus = matrices(0, 1, 2)
    u, s, vh = torch.linalg.svd(sum(taus), full_matrices=False)
    got = one(tm.Iso(1.0), *taus)
    close(got.sum(0), s.mean() * u @ vh)
    sides = torch.einsum("mr,kmn,rn->kr", u, got, vh)
    assert (sides > -1e-9).all()  # each expert has a share of each direction
    close(one(tm.Iso(1.0), taus[0], taus[0])[0], one(tm.Iso(1.0), taus[0], taus[0])[1])


@pytest.mark.parametrize("share", [0.8, 0.5, 0.1])
def test_iso_cts_is_the_published_sum(share: float) -> None:
    taus = torch.stack(matrices(0, 1, 2, shape=(20, 30)))
    close(one(tm.Iso(share), *taus).sum(0), iso_cts(taus, share), rtol=1e-6)


def test_iso_leaves_out_directions_that_nobody_has() -> None:
    s = torch.linalg.svdvals(one(tm.Iso(1.0), *low_rank(0, 1)).sum(0))
    close(s[:4], s[:1].expand(4))
    assert s[4] < 1e-9 * s[0]


def calibrated(taus: Tensor, scale: float, floor: float) -> Tensor:
    u, s, vh = torch.linalg.svd(scale * taus.sum(0), full_matrices=False)
    rows = [u.T @ tau for tau in taus]
    of = [(s[:, None] * vh * row).sum(1) / row.square().sum(1) for row in rows]
    factors = len(taus) / torch.stack(of).clamp_min(floor).sum(0)
    return u * (factors * s) @ vh


def test_svc_is_the_published_sum_and_keeps_what_cancels() -> None:
    taus = torch.stack(matrices(0, 1, 2))
    got = one(tm.Svc(0.3, 0.1), *taus)
    close(got.sum(0), calibrated(taus, 0.3, 0.1))
    opposite = one(tm.Svc(0.5), taus[0], -taus[0])  # their sum has no direction
    close(opposite, 0.5 * torch.stack([taus[0], -taus[0]]))


def test_svc_counts_equal_experts_once_and_others_fully() -> None:
    (tau,) = matrices(0)
    close(one(tm.Svc(0.3), tau, tau, tau, tau).sum(0), tau)
    first, second = torch.eye(6, 8, dtype=torch.float64).clone(), torch.zeros(6, 8, dtype=torch.float64)
    first[3:], second[3:] = 0, torch.eye(6, 8, dtype=torch.float64)[3:] * 2
    close(one(tm.Svc(1.0, floor=0.25), first, second).sum(0), (first + second) / (1.25 / 2))


def test_tsv_rank_by_energy() -> None:
    taus = matrices(0, 1)
    for tau, got in zip(taus, one(tm.Tsv(1.0, orthogonal=False, energy=0.7), *taus), strict=True):
        s = torch.linalg.svdvals(tau).square()
        rank = int(torch.linalg.matrix_rank(got, rtol=1e-6))
        assert s[: rank - 1].sum() < 0.7 * s.sum() <= s[:rank].sum()
    close(one(tm.Tsv(energy=0.999999), *taus), one(tm.Tsv(), *taus))  # `share` is the most


# --- the sphere ------------------------------------------------------------------------------------


def test_karcher_of_two_is_slerps_midpoint() -> None:
    first, second = matrices(0, 1)
    second = second * first.norm() / second.norm()
    close(one(tm.Karcher(), first, second), one(tm.Slerp(0.5, "task_vectors"), first, second))


def test_at_the_karcher_mean_the_logarithms_cancel() -> None:
    taus = torch.stack(matrices(0, 1, 2))
    results = one(tm.Karcher(steps=50, tolerance=1e-13), *taus)
    inner = taus.flatten(1) @ taus.flatten(1).T
    norms = inner.diagonal().sqrt()
    mean = (results * taus).flatten(1).sum(1) / norms.square() / norms.mean()
    assert length(mean, inner) == pytest.approx(1.0)
    step = tangent(mean, inner, 1 / norms, torch.full((3,), 1 / 3, dtype=torch.float64), logarithm=True)
    assert length(step, inner) < 1e-9


def test_means_of_weights_are_what_mergekits_files_give() -> None:
    taus = matrices(0, 1, 2)
    models = [BASE + tau for tau in taus]
    close(merged(tm.Karcher("weights"), *taus), merge("karcher", models[0], models))
    circle = merge("nuslerp", BASE, models[:2], weight=[0.7, 0.3], based=True)
    close(merged(tm.Slerp(0.3, "task_vectors"), *taus[:2]), circle)


# --- small spaces ----------------------------------------------------------------------------------


def adapters(*ranks: int) -> tuple[TaskVectors, TaskVectors]:
    """LoRA experts of one matrix, and the same made dense; the last did not change it."""
    base = torch.zeros(12, 16, dtype=torch.float64)
    ups, downs = ([matrices(s, shape=(12, r))[0] for s, r in enumerate(ranks)],
                  [matrices(s + 20, shape=(r, 16))[0] for s, r in enumerate(ranks)])  # fmt: skip
    terms: tuple[Term, ...] = (*(LowRank(u, d, 0.5) for u, d in zip(ups, downs, strict=True)), Untouched())
    names = tuple("abcdef"[: len(terms)])
    low = TaskVectors(names, {"w": Delta(base, terms)})
    dense = torch.stack([*(0.5 * u @ d for u, d in zip(ups, downs, strict=True)), base])
    return low, vectors({"w": dense}, {"w": base})


@pytest.mark.parametrize("kind", [tm.Knots, tm.CoreSpace])
def test_a_small_space_holds_all_experts(kind: type[tm.Preprocess]) -> None:
    low, dense = adapters(2, 3)
    for given in (low, dense):
        close(dict(kind(tm.Dare(0.0))(given))["w"], dense.deltas["w"].dense())
    full = vectors({"w": torch.stack(matrices(0, 1)), "bias": torch.stack(matrices(2, 3, shape=(1, 4)))})
    for name, taus in kind(tm.Dare(0.0))(full):
        close(taus, full.deltas[name].dense())


def test_knots_is_ties_of_rotated_experts() -> None:
    low, dense = adapters(2, 3)
    taus = dense.deltas["w"].dense()
    u, s, _ = torch.linalg.svd(torch.cat(list(taus), dim=1), full_matrices=False)
    u = u[:, s > 1e-9]
    want = u @ one(tm.Ties(0.4, merge="mean"), *(u.T @ tau for tau in taus))
    for given in (low, dense):
        close(dict(tm.Knots(tm.Ties(0.4, merge="mean"))(given))["w"], want)


def test_core_space_of_a_method_that_turns_along_is_the_method() -> None:
    """TSV-M does not depend on the basis; the core has 5 directions and the matrix 12."""
    low, dense = adapters(2, 3)
    want = dict(tm.Tsv(2 / 12)(dense))["w"]
    for given in (low, dense):
        close(dict(tm.CoreSpace(tm.Tsv(2 / 5))(given))["w"], want)


def test_pico_by_its_formulas() -> None:
    """Low-rank experts and one that is none, of one matrix."""
    low, dense = adapters(2, 3)
    taus = dense.deltas["w"].dense()
    count = len(taus)
    ups = torch.cat([0.5 * term.up for term in low.deltas["w"].terms if isinstance(term, LowRank)], dim=1)
    u, s, _ = torch.linalg.svd(ups, full_matrices=False)
    damped = 1 / (1 + (count - 1) * s.square() / s.square().sum())
    calibration = torch.eye(12, dtype=torch.float64) + u @ torch.diag(damped - 1) @ u.T
    want = calibration @ taus
    want = want * (taus.flatten(1).norm(dim=1).mean() / want.sum(0).norm())
    close(dict(tm.Pico(tm.Dare(0.0))(low))["w"], want, rtol=1e-5)


def test_pico_of_equal_directions_is_the_mean_norm() -> None:
    direction = torch.eye(6, 1, dtype=torch.float64)
    rows = [
        torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in range(3)
    ]
    terms = tuple(LowRank(direction, row, 1.0) for row in rows)
    given = TaskVectors(tuple("abc"), {"w": Delta(torch.zeros(6, 4, dtype=torch.float64), terms)})
    merged = dict(tm.Pico(tm.Dare(0.0))(given))["w"].sum(0)
    total = torch.stack(rows).sum(0)[0]
    size = torch.stack([row.norm() for row in rows]).mean()
    close(merged[0], total * size / total.norm(), rtol=1e-5)
    assert not merged[1:].any()


def test_knots_and_core_space_refuse_methods_that_need_data() -> None:
    for kind in (tm.Knots, tm.CoreSpace, tm.Pico):
        with pytest.raises(ValueError, match="method without data"):
            kind(tm.Fisher())


# --- activations -----------------------------------------------------------------------------------


def test_aims_factors() -> None:
    sizes = torch.tensor([0.0, 1.0, 4.0])
    close(tm.Aim(0.2).factors(sizes), torch.tensor([1.0, 0.8, 0.2]), rtol=1e-6)
    close(tm.Aim(1.0).factors(sizes), torch.ones(3))
    close(tm.Aim(0.2).factors(torch.zeros(3)), torch.ones(3))
    grows = tm.Aim(0.4).factors(torch.linspace(0, 1, 9))
    assert all(a > b for a, b in pairwise(grows.tolist()))
