"""The choice of codecs under a budget, against every possible choice."""

from itertools import pairwise, product

import pytest
import torch

from trainmerge.packed.budget import Offer, choose_offers, hull


def made_up(seed: int) -> list[Offer]:
    """One parameter's offers: none, and five codecs of random sizes and errors."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(10, 200, (5,), generator=generator).tolist()
    errors = torch.rand(5, generator=generator).tolist()
    made = [Offer(None, size, error) for size, error in zip(sizes, errors, strict=True)]
    return [Offer(None, 4, 1.0), *made]


def test_the_hull_has_what_no_mixture_of_others_beats() -> None:
    sizes = ((0, 4.0), (1, 3.5), (2, 1.0), (3, 1.5), (4, 0.0))
    found = [Offer(None, size, error) for size, error in sizes]
    assert [offer.nbytes for offer in hull(found)] == [0, 2, 4]


@pytest.mark.parametrize("seed", range(5))
def test_no_choice_of_the_same_size_has_a_smaller_error(seed: int) -> None:
    found = {str(i): made_up(10 * seed + i) for i in range(4)}
    every = [(sum(o.nbytes for o in one), sum(o.error for o in one)) for one in product(*found.values())]
    before = float("inf")
    for budget in (16, 60, 120, 250, 800):
        chosen = choose_offers(found, budget).values()
        size, error = sum(o.nbytes for o in chosen), sum(o.error for o in chosen)
        assert size <= budget
        assert error <= before
        before = error
        best = min(lost for nbytes, lost in every if nbytes <= budget)
        hulls = [hull(own) for own in found.values()]
        steps = [a.error - b.error for own in hulls for a, b in pairwise(own)]
        assert best <= error <= best + max(steps)  # within one step
    assert before == pytest.approx(min(lost for _, lost in every))


def test_less_than_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"5 bytes beside the base are too few; .* alone take 8"):
        choose_offers({"a": made_up(0), "b": made_up(1)}, 5)
