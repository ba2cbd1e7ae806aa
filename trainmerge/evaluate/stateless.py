"""Whether a model's forward leaves the model as it was: only then may forwards run side by side.

Some models keep something of the last call: a table of positions for longer texts, a cached mask.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType

from torch import Tensor, nn


def is_stateless(module: nn.Module, forward: Callable[[], object]) -> bool:
    """Whether the modules have the same attributes after a forward, buffers included."""
    before = list(_content(module))  # alive until compared, so that no address is used again
    forward()
    after = list(_content(module))
    same = (a is b and version == now for (a, version), (b, now) in zip(before, after, strict=True))
    return len(before) == len(after) and all(same)


def _content(module: nn.Module) -> Iterator[tuple[object, float]]:
    """All that the modules hold, however deep in objects of other classes, and how often tensors changed."""
    seen: set[int] = set()
    waiting: list[object] = [value for part in module.modules() for value in vars(part).values()]
    while waiting:
        value = waiting.pop()
        yield value, _version(value)
        if id(value) not in seen and not isinstance(value, nn.Module):
            seen.add(id(value))
            waiting += _inside(value)


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (list, tuple, set, frozenset)):
        return value
    whole = isinstance(value, (Tensor, type, ModuleType))
    return () if whole else getattr(value, "__dict__", {}).values()


def _version(value: object) -> float:
    """How often a tensor changed; NaN, which equals nothing, where inference mode does not count."""
    if not isinstance(value, Tensor):
        return 0
    return math.nan if value.is_inference() else value._version
