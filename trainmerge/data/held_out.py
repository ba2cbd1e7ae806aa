"""A part of each expert's examples that a fit does not see, to judge merges by."""

from collections.abc import Sequence
from typing import TypeVar

import torch

T = TypeVar("T")

LEAST = 8  # held-out examples per expert, where there are twice as many


def split(examples: Sequence[T], share: float, seed: int, expert: int) -> tuple[list[T], list[T]]:
    """The examples to learn from and the held-out ones, each in their order; drawn by seed and expert.

    At least `LEAST` are held out, and never more than half.

    Raises:
        ValueError: a single example cannot be split.

    >>> split(["a", "b", "c", "d"], 0.25, seed=0, expert=0)
    (['c', 'd'], ['a', 'b'])
    """
    if not share:
        return list(examples), []
    if len(examples) < 2:
        raise ValueError("data.held_out needs two examples per expert or more")
    count = min(max(LEAST, round(share * len(examples))), len(examples) // 2)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + expert) % 2**63)
    held = {*torch.randperm(len(examples), generator=generator)[:count].tolist()}
    return (
        [example for i, example in enumerate(examples) if i not in held],
        [example for i, example in enumerate(examples) if i in held],
    )
