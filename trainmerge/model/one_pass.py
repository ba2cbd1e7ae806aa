"""One pass over the task vectors per step: a parameter is merged again as soon as its gradient is complete.

In a step's last backward its base and task vectors are there for the inner products. With the coefficients
that the step will give, predicted from the gradient, the next merge is written from the same copy. Nothing
depends on the prediction: a merge skips what stands at its very coefficients, and writes all else.

An operation of the backward that reads a weight after its next merge (a recomputed block's, say) waits until
the step's own merge is back. Like `postponed`, this sees what torch dispatches.

Legend: `K` experts, `G` coefficient groups, `C` chunks of one parameter.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from typing_extensions import override

from trainmerge.model.postponed import storage_of, storages_in
from trainmerge.task_vectors.prefetch import largest_block

Predict = Callable[
    [Tensor], Tensor
]  # d loss / d coefficients so far -> the coefficients to come, both [K, G]
LOG = logging.getLogger(__name__)
Of = Callable[[str], Tensor]  # a parameter's coefficients [K, C]


class Standing:
    """The coefficients at which parameters are merged, where a merge may be skipped; else nothing.

    Args:
        owners: Each name's parameter: what others write to it is noticed by its version.
    """

    def __init__(self, owners: Mapping[str, Tensor]) -> None:
        self.on, self._owners = False, owners
        self._at: dict[str, tuple[Tensor, int]] = {}

    def left(self, names: Iterable[str], of: Of) -> list[str]:
        """The names that are not merged at these coefficients."""
        return [name for name in names if not self._stands(name, of)]

    def _stands(self, name: str, of: Of) -> bool:
        values, version = self._at.get(name, (None, 0))
        return values is not None and version == self._owners[name]._version and torch.equal(values, of(name))

    def wrote(self, names: Iterable[str], of: Of) -> None:
        """These are merged at these coefficients."""
        if self.on:
            self._at |= {name: (of(name), self._owners[name]._version) for name in names}

    def forget(self, names: Iterable[str]) -> None:
        """Something is written over these."""
        for name in names:
            self._at.pop(name, None)

    def stop(self) -> None:
        """Forget all, and whatever is written from now on."""
        self.on, self._at = False, {}


class OnePass(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes next merges within a backward.

    Args:
        sets: Names that share coefficients, and so are merged together.
        owners: Each name's parameter.
        sizes: Bytes of each name's base and task vectors.
        standing: Of the merge.
        gradient: d loss / d coefficients [K, G] so far.
        write: Merges names at coefficients [K, G]; at None, the step's own.
    """

    def __init__(
        self,
        sets: Iterable[Sequence[str]],
        owners: Mapping[str, Tensor],
        sizes: Mapping[str, int],
        standing: Standing,
        gradient: Callable[[], Tensor],
        write: Callable[[Sequence[str], Tensor | None], None],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._set_of = {name: together for together in sets for name in together}
        self._owners, self._sizes, self._standing = owners, sizes, standing
        self._gradient, self._write = gradient, write
        self._predict: Predict | None = None
        self._complete: set[str] = set()
        self._written: dict[int, list[str]] = {}  # storage -> names in it that have their next merge
        self._late: set[str] = set()  # names that were read after it
        self.stopped = False

    @contextmanager
    def during(self, predict: Predict) -> Iterator[None]:
        """A step's last backward."""
        if self.stopped:
            yield
            return
        self._standing.on, self._predict = True, predict
        self._complete, self._written = set(), {}
        with self:
            yield

    def complete(self, names: Sequence[str]) -> None:
        """Gradients of these are complete: write the next merge of the sets that are."""
        if self.stopped or self._predict is None:
            return
        self._complete.update(names)
        for together in dict.fromkeys(self._set_of[name] for name in names):
            if self._complete.issuperset(together) and self._late.isdisjoint(together):
                with _disable_current_modes(), torch.no_grad():
                    self._write(together, self._predict(self._gradient()))
                for name in together:
                    self._written.setdefault(storage_of(self._owners[name]), []).append(name)

    def judge(self, left: Sequence[str]) -> None:
        """After a step, whose merge these still lacked: if they are most of it, a backward writes no more."""
        share = sum(self._sizes[name] for name in left) / sum(self._sizes[name] for name in self._owners)
        if share > 0.5:
            self.stopped = True
            self._standing.stop()
            LOG.info("two passes per step from here on: a backward could not write %.0f%%", 100 * share)

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, on the step's own merge."""
        if self._written:
            for storage in storages_in(args, kwargs):
                if names := self._written.pop(storage, None):
                    self._late.update(names)
                    with _disable_current_modes(), torch.no_grad():
                        self._write(names, None)
        return func(*args, **(kwargs or {}))


def sets_of(
    groups: Mapping[str, Sequence[int]], sizes: Mapping[str, int], held: Collection[str] = ()
) -> list[tuple[str, ...]]:
    """The learned names that share coefficients, together.

    There are none if one set is larger than the largest block: when its last gradient is complete, its first
    task vectors are no longer on the device. Nor if two passes, which find what the device's buffer of two
    such blocks holds at either turn, send less than one.

    Args:
        groups: Learned name -> the groups of its coefficients.
        sizes: Bytes of each merged name's base and task vectors.
        held: Names that stay on the device.

    >>> sets_of({"a": (0, 1), "b": (2,), "c": (0, 1)}, {"a": 1, "b": 2, "c": 1, "d": 2, "e": 2, "f": 1})
    [('a', 'c'), ('b',)]
    >>> sets_of({f"layers.{i}.a": (0,) for i in range(9)}, {f"layers.{i}.a": 1 for i in range(9)})
    []
    """
    found: dict[int, list[str]] = {}
    for name, columns in groups.items():
        found.setdefault(min(columns), []).append(name)
    block = largest_block(sizes)
    less = sum(size for name, size in sizes.items() if name not in held) > 4 * block
    fit = less and all(sum(sizes[name] for name in together) <= block for together in found.values())
    return [tuple(together) for together in found.values()] if fit else []
