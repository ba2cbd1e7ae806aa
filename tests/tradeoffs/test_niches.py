"""Natural niches: their formulas on examples by hand, mixing, resuming.

Legend: `P` genomes, `N` examples, `K` experts, `G` coefficient groups.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from trainmerge.tradeoffs.niches import Niches, attraction, evolve, fitness, mixed

SOLVED = torch.tensor([[1.0, 1, 1, 1, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.float64)


def test_what_is_shared_is_worth_less() -> None:
    """Two genomes solve the first four examples, one the last."""
    assert fitness(SOLVED, 0.0).tolist() == [4, 4, 1]
    assert fitness(SOLVED, 1.0).tolist() == [2, 2, 1]
    assert attraction(SOLVED, 0, 1.0).tolist() == [0, 0, 1]
    dice = torch.rand(7, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solved = dice * (dice > 0.8)
    assert fitness(solved, 1.0).sum() == pytest.approx(int(solved.any(dim=0).sum()))
    torch.testing.assert_close(fitness(solved, 0.0), solved.sum(dim=1))


def test_a_child_is_of_both_parents_with_a_border_in_the_networks_order() -> None:
    first, second = [1.0, 2, 3, 4, 5, 6], [0.0] * 6  # K 2, G 3
    child = mixed(first, second, order=[2, 0, 1], weight=0.75, border=1)
    assert child == pytest.approx([0.25, 0.5, 2.25, 1, 1.25, 4.5])
    assert mixed(first, second, [0, 1, 2], 0.75, 3) == pytest.approx([0.75 * x for x in first])


class Specialists:
    """Example j is solved by the j-th coefficient; best is one expert below, the other above the border."""

    best = (1.0, 0.0, 0.0, 1.0)

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Sequence[float]) -> list[float]:
        self.calls += 1
        return [max(0.0, 1 - 2 * abs(a - b)) for a, b in zip(x, self.best, strict=True)]


def run(log: Path, evaluations: int, score: Specialists, **changes: float) -> list[float]:
    starts = [[0.5, 0.5, 0.5, 0.5], [1.0, 1, 0, 0], [0.0, 0, 1, 1]]
    niches = Niches(evaluations, population=6, seed=3, **changes)  # type: ignore[arg-type]
    return [genome.score for genome in evolve(score, starts, [0, 1], niches, log)]


def test_specialists_meet(tmp_path: Path) -> None:
    """Each expert alone solves half of the examples; a child of both, all of them."""
    scores = run(tmp_path / "log", 60, Specialists())
    assert scores[:3] == [0.0, 0.5, 0.5]
    assert max(scores) > 0.9


def test_a_resumed_search_is_the_same_to_the_bit(tmp_path: Path) -> None:
    whole, first = Specialists(), Specialists()
    want = run(tmp_path / "whole", 30, whole)
    run(tmp_path / "cut", 11, first)
    assert first.calls == 11
    with (tmp_path / "cut").open("a") as file:
        file.write('{"x": [0.1')  # a line that was being written
    second = Specialists()
    assert run(tmp_path / "cut", 30, second) == want
    assert second.calls == 19
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()
    with pytest.raises(ValueError, match=r"different search: \['alpha'\]"):
        run(tmp_path / "cut", 30, second, alpha=0.5)


def test_scores_below_zero_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 or more"):
        list(evolve(lambda _: [-1.0], [[1.0]], [0], Niches(3), tmp_path / "log"))
