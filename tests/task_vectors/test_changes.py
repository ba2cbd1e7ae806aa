"""A change of a parameter equals the float64 sum of its terms, for any terms, chunks and pieces."""

from itertools import pairwise

import pytest
import torch

from trainmerge.kernels import Difference, ExpertWeight, LowRank, Term, Untouched, chunk_bounds
from trainmerge.task_vectors import pieces
from trainmerge.task_vectors.changes import Change
from trainmerge.task_vectors.delta import Delta, dense_term

SHAPE = (7, 5)


def terms(shape: tuple[int, ...] = SHAPE) -> tuple[torch.Tensor, dict[str, Term]]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator).bfloat16()

    def some(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    factors = (
        {f"adapter {r}": LowRank(some(shape[0], r), some(r, 5), 0.7 * r) for r in (1, 3)}
        if len(shape) > 1
        else {}
    )
    return base, {
        "dense": Difference(some(*shape)),
        "full": ExpertWeight(base + 0.1 * some(*shape).bfloat16()),
        "none": Untouched(),
        **factors,
    }


def wanted(base: torch.Tensor, used: tuple[Term, ...], weights: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(base.shape, dtype=torch.float64)
    bounds = chunk_bounds(len(base), weights.shape[1])
    for term, own in zip(used, weights, strict=True):
        tau = dense_term(term, base.double())
        for chunk, (first, last) in enumerate(pairwise(bounds)):
            total[first:last] += own[chunk] * tau[first:last]
    return total


@pytest.mark.parametrize("chunks", [1, 3, 7])
@pytest.mark.parametrize("size", [4, 1000])
def test_blocks_are_the_weighted_sum(chunks: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", size)
    base, found = terms()
    weights = torch.randn(len(found), chunks, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    change = Change("w", Delta(base, tuple(found.values())), weights)
    assert not change.low_rank
    want = wanted(base, tuple(found.values()), weights)
    torch.testing.assert_close(
        change.dense(), want, rtol=0, atol=1e-5
    )  # low-rank terms are scaled in float64
    assert change.square() == pytest.approx(float(want.square().sum()), rel=1e-6)


@pytest.mark.parametrize("chunks", [1, 2, 7])
def test_stacked_factors_are_exact_for_any_chunks(chunks: int) -> None:
    base, found = terms()
    used = (found["adapter 1"], found["none"], found["adapter 3"])
    weights = torch.randn(3, chunks, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    change = Change("w", Delta(base, used), weights)
    assert change.low_rank
    up, down = change.stacked()
    assert (up.shape, down.shape) == ((7, 4), (4, 5))
    torch.testing.assert_close(up @ down, wanted(base, used, weights), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(up @ down, change.dense(), rtol=1e-12, atol=1e-12)
    assert change.square() == pytest.approx(float((up @ down).square().sum()))


def test_a_weight_of_zero_leaves_a_term_out() -> None:
    base, found = terms()
    delta = Delta(base, (found["adapter 1"], found["full"]))
    change = Change("w", delta, torch.tensor([[0.5], [0.0]]))
    assert change.low_rank
    assert change.stacked()[0].shape == (7, 1)
    assert Change("w", delta, torch.zeros(2, 1)).used == ()


def test_a_rule_replaces_its_terms_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 10)
    base, found = terms()
    delta = Delta(base, (found["full"], found["adapter 1"]))
    seen = []

    def doubled(piece: str, part: Delta) -> torch.Tensor:
        seen.append(piece)
        return 2 * part.dense()

    change = Change("w", delta, torch.tensor([[1.0], [0.5], [-1.0]]), doubled, (found["dense"],))
    full, low, own = (dense_term(found[key], base.double()) for key in ("full", "adapter 1", "dense"))
    torch.testing.assert_close(change.dense(), 2 * full + low - own, rtol=0, atol=1e-5)
    assert not change.low_rank
    assert seen[0] == "w[0:2]"


@pytest.mark.parametrize("shape", [(6,), (), (3, 5, 2, 2)])
def test_parameters_that_are_no_matrix(shape: tuple[int, ...]) -> None:
    base, tau = torch.ones(shape), torch.full(shape, 3.0)
    change = Change("b", Delta(base, (Difference(tau), ExpertWeight(base + 1))), torch.tensor([[0.5], [2.0]]))
    assert torch.equal(change.dense(), torch.full(shape, 3.5).double())
    assert change.square() == 3.5**2 * base.numel()
