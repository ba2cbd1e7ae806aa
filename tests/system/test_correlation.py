"""Spearman's correlation against values by hand."""

import math

import pytest
import torch

from trainmerge.system.correlation import rank_correlation, rank_terms, standardised


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [
        ([1, 5, 9], [0, 0.1, 7], 1.0),
        ([1, 2, 3], [2, 3, 1], -0.5),
        ([1, 2, 3], [5, 5, 7], 1.5 / 3**0.5),  # ranks 1.5, 1.5, 3
        ([1, 2, 3], [4, 4, 4], 0.0),
        ([0.1, 0.1, 0.1], [0.1, 0.1, 0.1], 0.0),
    ],
)
def test_spearman_by_hand(one: list[float], other: list[float], wanted: float) -> None:
    a, b = torch.tensor(one), torch.tensor(other)
    assert rank_correlation(a, b) == pytest.approx(wanted)
    assert rank_terms(a, b).shape == (3,)


def test_equal_numbers_stay_equal_though_their_mean_is_rounded() -> None:
    values = torch.full((7,), 0.1, dtype=torch.float64)
    assert not torch.equal(values - values.mean(), torch.zeros(7))
    assert torch.equal(standardised(values), torch.zeros(7))


def test_one_number_has_no_correlation() -> None:
    assert math.isnan(rank_correlation(torch.ones(1), torch.ones(1)))


def test_what_is_not_a_number_has_no_rank() -> None:
    assert math.isnan(rank_correlation(torch.tensor([1.0, 2.0, math.nan]), torch.arange(3)))
    assert rank_correlation(torch.tensor([1.0, 2.0, -math.inf]), torch.tensor([2, 3, 1])) == pytest.approx(1)
