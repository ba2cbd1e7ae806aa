"""What passes over the task vectors add to a step, whose bytes cross a link beside forwards and backwards.

The merge is sent beside the first round's forwards, and a pass for the gradient beside its backward. No exact
schedule of two passes does better with a small buffer: the last block is merged before the first backward
begins, and no inner product is taken before that. A merge that the backward before has written sends nothing.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple


class Computing(NamedTuple):
    """The forwards and backwards of a step."""

    seconds: float
    backwards: int = 1  # rounds of forwards and one backward
    recompute: bool = False  # whether backwards run the forwards again
    whole: bool = False  # whether the merge is written before the forwards: a sharded model's

    @property
    def forward(self) -> float:
        """Seconds of the forwards beside which the merge is sent: a backward takes twice as long."""
        return 0.0 if self.whole else self.seconds / self.backwards / (4 if self.recompute else 3)

    @property
    def backward(self) -> float:
        """Seconds of one backward."""
        return self.seconds / self.backwards * (3 / 4 if self.recompute else 2 / 3)


class Pass(NamedTuple):
    """Seconds of one pass."""

    kernels: float
    sending: float = 0.0

    @staticmethod
    def of(sizes: Mapping[str, int], held: Collection[str], bandwidth: float, link: float) -> "Pass":
        """A pass over these bytes of parameters, which are sent unless `held`; a link of 0 sends nothing."""
        sent = sum(size for name, size in sizes.items() if name not in held)
        return Pass(sum(sizes.values()) / bandwidth, sent / link if link else 0.0)

    def added(self, computing: float) -> float:
        """Seconds that it adds to so many of computing.

        >>> Pass(kernels=1, sending=5).added(3), Pass(kernels=1, sending=5).added(9)
        (2, 1)
        """
        return max(self.kernels, self.sending - computing)


def merging_seconds(computing: Computing, merge: Pass, products: Pass, passes: int) -> float:
    """Seconds that the merge and `passes` for the gradient add to a step.

    >>> merging_seconds(Computing(6), Pass(0, 3), Pass(0, 3), 1)  # sending takes as long as computing
    1.0
    """
    return merge.added(computing.forward) + passes * products.added(computing.backward)
