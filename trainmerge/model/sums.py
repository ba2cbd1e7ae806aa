"""The sums of a step's inner products.

Legend: `K` experts, `G` coefficient groups, `C` chunks of one parameter.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.kernels import Gathered, Product, run_products
from trainmerge.model.exact import exact
from trainmerge.model.placed import Placed

Found = tuple[str, Sequence[int], Tensor]  # a name, its groups, and the products [K, C] to add to these


class Sums:
    """Adds inner products up, many small terms, in float64 and in the order in which they were found.

    Args:
        placed: Where the names are in the module.
        coefficients: The coefficients, whose gradient the sums are.
    """

    def __init__(self, placed: Placed, coefficients: Coefficients) -> None:
        self._placed, self._coefficients = placed, coefficients
        self._products = Gathered(self._run)
        self._found: list[Found] = []
        self._total: Tensor | None = None
        self.reached: set[str] = set()  # parts of parameters that had a gradient

    def queue(self, name: str, groups: Sequence[int], product: Product, size: int) -> None:
        """Add a product, which may wait for others (`Gathered.add`)."""
        self._products.add((name, groups, product), size)

    def add(self, name: str, groups: Sequence[int], inner: Tensor) -> None:
        """Add inner products [K, C]."""
        self._found.append((name, groups, inner))

    def _run(self, calls: Sequence[tuple[str, Sequence[int], Product]]) -> None:
        with exact(calls[0][2].grad):
            found = run_products([product for *_, product in calls])
        self._found += [(*call[:2], inner) for call, inner in zip(calls, found, strict=True)]

    @contextmanager
    def arranged(self, names: Iterable[str]) -> Iterator[None]:
        """What is found in this context is added in the order of these names."""
        self._products.flush()
        before = len(self._found)
        yield
        self._products.flush()
        places = {name: place for place, name in enumerate(names)}
        self._found[before:] = sorted(self._found[before:], key=lambda found: places[found[0]])

    def so_far(self) -> Tensor:
        """The sums [K, G] in float64; fixed coefficients have 0."""
        self._products.flush()
        found, self._found = self._found, []
        if self._total is None:
            self._total = torch.zeros(self._coefficients.raw.shape, dtype=torch.float64)
        if found:  # on the CPU, in a fixed order: a GPU's index_add_ is nondeterministic
            columns = torch.tensor([column for _, columns, _ in found for column in columns])
            inner = torch.cat([inner for *_, inner in found], 1).cpu().double()
            self._total.index_add_(1, columns, inner)
            self.reached |= self._placed.moved([(name, len(own)) for name, own, _ in found], inner)
        fixed = torch.tensor(self._coefficients.layout.fixed, dtype=torch.int64)
        return self._total.index_fill(1, fixed, 0.0)

    def taken(self) -> Tensor:
        """The sums [K, G]; the next ones begin at zero."""
        total, self._total = self.so_far(), None
        return total
