"""Parameters that are merged just before their use: a unit at a time, before its own forward.

Then copies over a link run beside the forwards of the units before. A weight of a unit may be read by another
module too, so every operation is watched: one that reads a parameter not yet merged waits for its unit.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from trainmerge.model.hooks import hooked
from trainmerge.model.units import units


class Postponed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """In this context, groups of names are written when their unit begins, or something reads them.

    Args:
        groups: Unit -> the names in it.
        owners: Each name's parameter.
        write: Merges these names.
    """

    def __init__(
        self,
        groups: Mapping[nn.Module, Sequence[str]],
        owners: Mapping[str, Tensor],
        write: Callable[[Sequence[str]], None],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._left, self._write = dict(groups), write
        self._units: dict[int, list[nn.Module]] = {}  # storage -> whose parameters are in it
        for unit, names in groups.items():
            for storage in {storage_of(owners[name]) for name in names}:
                self._units.setdefault(storage, []).append(unit)

    def begin(self, unit: nn.Module, _: object = None) -> None:
        """Write what is left of a unit."""
        if unit in self._left:
            with _disable_current_modes(), torch.no_grad():
                self._write(self._left.pop(unit))

    def finish(self) -> None:
        """Write what is left."""
        for unit in [*self._left]:
            self.begin(unit)

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, after the merge of what it reads."""
        if self._left:
            for storage in storages_in(args, kwargs):
                for unit in self._units.get(storage, ()):
                    self.begin(unit)
        return func(*args, **(kwargs or {}))


@contextmanager
def postponed(
    groups: Mapping[nn.Module, Sequence[str]],
    owners: Mapping[str, Tensor],
    write: Callable[[Sequence[str]], None],
) -> Iterator[None]:
    """In this context `Postponed` writes each unit when it begins; at its end all are written."""
    waiting = Postponed(groups, owners, write)
    with hooked(unit.register_forward_pre_hook(waiting.begin) for unit in groups), waiting:
        yield
    waiting.finish()


def by_unit(module: nn.Module, owners: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """The unit of each name that has one; of no name if the module has compiled parts, which hide reads."""
    if any(_compiled(part) for part in module.modules()):
        return {}
    found = {id(own): unit for unit in units(module) for own in unit.parameters()}
    return {name: found[id(own)] for name, own in owners.items() if id(own) in found}


def grouped(
    order: Iterable[str], unit_of: Mapping[str, nn.Module]
) -> tuple[list[str], dict[nn.Module, list[str]]]:
    """The names of no unit, and the others by unit, in the order of the first name of each."""
    outside: list[str] = []
    groups: dict[nn.Module, list[str]] = {}
    for name in order:
        (groups.setdefault(unit_of[name], []) if name in unit_of else outside).append(name)
    return outside, groups


def _compiled(module: nn.Module) -> bool:
    """Whether this is `torch.compile(module)`, or `module.compile()` was called; imports no compiler."""
    wrapped = type(module).__module__.startswith("torch._dynamo")
    return wrapped or getattr(module, "_compiled_call_impl", None) is not None


def storages_in(*arguments: Any) -> Iterator[int]:
    """The memory of every tensor that an operation is given."""
    return (storage_of(part) for part in tree_leaves(arguments) if isinstance(part, Tensor))


def storage_of(tensor: Tensor) -> int:
    """Identifies the memory of an ordinary tensor; 0 for another kind, which no parameter is."""
    ordinary = tensor.layout == torch.strided and not tensor.is_nested
    return tensor.untyped_storage()._cdata if ordinary else 0
