"""A part of each expert's examples that a fit does not see, to judge merges by."""

from collections.abc import Sequence
from typing import TypeVar

import torch

T = TypeVar("T")

LEAST = 8  # held-out examples per expert, where there are twice as many


def with_held_out(learned: int, share: float) -> int:
    """The fewest examples of which `split` leaves `learned` to learn from.

    >>> with_held_out(64, 0.2)
    80
    >>> with_held_out(10, 0.2)
    18
    """
    return next(n for n in range(learned, 2 * learned + 1) if n - held_of(n, share) >= learned)


def held_of(count: int, share: float) -> int:
    """How many of `count` examples are held out: at least `LEAST`, and never more than half."""
    return min(max(LEAST, round(share * count)), count // 2) if share else 0


def split(examples: Sequence[T], share: float, seed: int, expert: int) -> tuple[list[T], list[T]]:
    """The examples to learn from and the held-out ones, each in their order; drawn by seed and expert.

    Raises:
        ValueError: a single example cannot be split.

    >>> split(["a", "b", "c", "d"], 0.25, seed=0, expert=0)
    (['c', 'd'], ['a', 'b'])
    """
    if not share:
        return list(examples), []
    if len(examples) < 2:
        raise ValueError("data.held_out needs two examples per expert or more")
    count = held_of(len(examples), share)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + expert) % 2**63)
    held = {*torch.randperm(len(examples), generator=generator)[:count].tolist()}
    return (
        [example for i, example in enumerate(examples) if i not in held],
        [example for i, example in enumerate(examples) if i in held],
    )
