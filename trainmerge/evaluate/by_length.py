"""Batches of examples of like length, so that little padding is computed.

Legend: `N` examples.
"""

from collections.abc import Iterable, Sequence

TOGETHER = 64  # examples per forward pass at most
TOKENS = 512  # per forward pass on a CPU, about: what it computes stays in the cache


def by_length(
    numbers: Iterable[int], lengths: Sequence[int], tokens: int = TOKENS, together: int = TOGETHER
) -> list[list[int]]:
    """The numbers in batches, the shortest first; `lengths` [N] are tokens.

    With padding a batch has at most `tokens` tokens, unless one example has more.

    >>> by_length(range(4), [5, 2, 9, 3], tokens=10)
    [[1, 3], [0], [2]]
    """
    batches: list[list[int]] = []
    for i in sorted(numbers, key=lambda i: lengths[i]):
        size = len(batches[-1]) if batches else together
        if size == together or (size + 1) * lengths[i] > tokens:
            batches.append([])
        batches[-1].append(i)
    return batches
