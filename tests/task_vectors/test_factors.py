"""Factors against float64 singular values: errors to the digit, and ranks by energy."""

import pytest
import torch

from trainmerge.task_vectors import factors
from trainmerge.task_vectors.factors import Budget, Factors, product_square, recompress, truncate

CLOSE = 1e-12  # relative, of float64 decompositions of small matrices


def stacked(rows: int = 24, columns: int = 17, size: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors whose product has singular values of several sizes."""
    generator = torch.Generator().manual_seed(3)
    up = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    scale = torch.logspace(0, -3, size, dtype=torch.float64)
    return up * scale, torch.randn(size, columns, generator=generator, dtype=torch.float64)


def tail(matrix: torch.Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(matrix)[rank:].square().sum())


def actual(found: Factors, matrix: torch.Tensor) -> float:
    return float((found.up.double() @ found.down.double() - matrix).square().sum())


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_a_truncation_loses_the_tail_of_the_singular_values(rank: int) -> None:
    up, down = stacked()
    matrix = up @ down
    square = float(matrix.square().sum())
    for found in (recompress(up, down, Budget(rank)), truncate(matrix, Budget(rank))):
        assert found.up.shape == (24, rank)
        assert found.down.shape == (rank, 17)
        assert found.square == pytest.approx(square, rel=CLOSE)
        assert found.lost == pytest.approx(tail(matrix, rank), abs=CLOSE * square)
        assert found.lost == pytest.approx(actual(found, matrix), abs=CLOSE * square)


def test_factors_that_fit_the_rank_are_left_as_they_are() -> None:
    up, down = stacked()
    for budget in (Budget(), Budget(9), Budget(50), Budget(energy=1.0)):
        found = recompress(up, down, budget)
        assert found.how == "exact"
        assert found.lost == 0
        assert torch.equal(found.up, up)
        assert torch.equal(found.down, down)


def test_more_columns_than_the_matrix_has_are_recompressed_without_a_loss() -> None:
    up, down = stacked(rows=5, columns=4, size=9)
    found = recompress(up, down, Budget(6))
    assert (found.rank, found.how) == (4, "recompressed")
    assert actual(found, up @ down) < CLOSE * found.square


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
def test_energy_keeps_the_fewest_singular_values(energy: float) -> None:
    up, down = stacked()
    matrix = up @ down
    squares = torch.linalg.svdvals(matrix).square()
    found = truncate(matrix, Budget(energy=energy))
    shares = squares.cumsum(0) / squares.sum()
    assert found.rank == 9 if energy == 1.0 else float(shares[found.rank - 1]) >= energy
    assert found.rank == 1 or float(shares[found.rank - 2]) < energy
    assert recompress(up, down, Budget(energy=energy)).rank == found.rank


def test_energy_met_exactly_needs_no_further_value() -> None:
    matrix = torch.diag(torch.tensor([2.0, 2.0, 2.0, 2.0]))
    assert truncate(matrix, Budget(energy=0.5)).rank == 2
    assert truncate(matrix, Budget(energy=0.51)).rank == 3


def test_a_large_matrix_is_cut_in_a_random_subspace_with_an_exact_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(factors, "EXACT", 16)
    monkeypatch.setattr(factors, "FIRST", 4)
    monkeypatch.setattr(factors, "ROWS", 100)  # several blocks of rows
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(n, 90, generator=generator).double())[0] for n in (120, 90))
    matrix = left @ torch.diag(torch.logspace(0, -2, 90).double()) @ right.T
    found = truncate(matrix.float(), Budget(6))
    assert found.how == "randomised SVD"
    assert found.lost == pytest.approx(actual(found, matrix.float().double()), rel=1e-9)
    assert tail(matrix, 6) <= found.lost * (1 + 1e-6) <= 1.01 * tail(matrix, 6)
    some = truncate(matrix, Budget(energy=0.5))
    assert some.how == "randomised SVD"
    assert some.lost <= 0.5 * some.square
    assert truncate(matrix, Budget(energy=0.999)).how == "SVD"  # nearly all values are needed
    again = truncate(matrix.float(), Budget(6))
    assert torch.equal(found.up, again.up)


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (1, 5), (5, 1), (1, 1)])
def test_small_shapes_and_nothing(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = truncate(matrix, Budget(16))
    assert found.rank == min(shape)
    assert actual(found, matrix) < CLOSE * found.square
    for nothing in (
        truncate(torch.zeros(shape), Budget(2)),
        recompress(torch.zeros(4, 0), torch.zeros(0, 3), Budget(1)),
    ):
        assert (nothing.rank, nothing.square, nothing.lost) == (0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_is_part_of_the_error(dtype: torch.dtype) -> None:
    up, down = stacked()
    found = recompress(up, down, Budget()).rounded(dtype)
    assert found.up.dtype == found.down.dtype == dtype
    assert found.lost == pytest.approx(actual(found, up @ down), rel=1e-6)
    assert 0 < found.lost / found.square < (4 * torch.finfo(dtype).eps) ** 2


def test_a_norm_from_factors_survives_cancellation() -> None:
    up, down = stacked()
    wide, tall = torch.cat([up, -up], dim=1), torch.cat([down, down + 1e-7])
    assert product_square(wide, tall) == pytest.approx(float((wide @ tall).square().sum()), rel=1e-6)


def test_a_budget_is_checked() -> None:
    with pytest.raises(ValueError, match=r"adapter.rank must be at least 1"):
        Budget(0)
    with pytest.raises(ValueError, match=r"adapter.energy must be in \(0, 1\]"):
        Budget(energy=1.5)
    with pytest.raises(ValueError, match="exclude each other"):
        Budget(4, 0.9)
