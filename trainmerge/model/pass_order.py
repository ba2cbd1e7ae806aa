"""The order of a step's passes over the parameters: each begins where the last one ended.

A merge may write parameters in any order; the coefficients' gradient needs them as a backward completes their
gradients. So a merge begins with what was collected last and ends with what is collected first: at both turns
the last task vectors are still on the device, or in the system's page cache.
"""

from collections.abc import Collection, Iterable, Mapping
from itertools import pairwise


class PassOrder:
    """Learns the order of backwards, and gives that of merges."""

    def __init__(self) -> None:
        self._recent: dict[str, None] = {}  # collected names, the last one last
        self._after: dict[str, str] = {}  # the successor of each in the last backward
        self._seen: set[str] = set()  # in the current backward
        self._last = ""
        self._written: dict[str, int] = {}  # places in the last merge

    @property
    def after(self) -> Mapping[str, str]:
        """The successor of each name in the last backward."""
        return self._after

    def collected(self, name: str) -> None:
        """A pass over gradients is at this name; at one that it has passed, the next pass has begun."""
        if name in self._seen:
            self._turn()
        if self._last:
            self._after[self._last] = name
        self._after.pop(name, None)
        self._seen.add(name)
        self._recent.pop(name, None)
        self._recent[name], self._last = None, name

    def of_merge(self, names: Collection[str]) -> list[str]:
        """These names, the last collected first and the first collected last; others lie in the middle."""
        self._turn()
        turned = [name for name in reversed(self._recent) if name in names]
        half = len(turned) // 2
        others = [name for name in names if name not in self._recent]
        order = [*turned[:half], *others, *turned[half:]]
        self._written = {name: place for place, name in enumerate(order)}
        return order

    def of_sums(self, names: Iterable[str]) -> list[str]:
        """These names, whose gradients were added up over a step's backwards, the last merged first."""
        self._turn()
        return sorted(names, key=lambda name: -self._written.get(name, 0))

    def _turn(self) -> None:
        """The next name is not the successor of the last one."""
        self._seen, self._last = set(), ""


def successors(names: Iterable[str]) -> dict[str, str]:
    """The successor of each name but the last.

    >>> successors("abc")
    {'a': 'b', 'b': 'c'}
    """
    return dict(pairwise(names))
