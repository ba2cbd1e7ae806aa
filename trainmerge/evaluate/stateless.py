"""Whether a model's forward leaves the model as it was: only then may forwards run side by side.

Some models keep something of the last call: a table of positions for longer texts, a cached mask.
"""

import math
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn


def is_stateless(module: nn.Module, forward: Callable[[], object]) -> bool:
    """Whether the modules have the same attributes after a forward, buffers included."""
    before = list(_content(module))  # alive until compared, so that no address is used again
    forward()
    after = list(_content(module))
    same = (a is b and version == now for (a, version), (b, now) in zip(before, after, strict=True))
    return len(before) == len(after) and all(same)


def _content(module: nn.Module) -> Iterator[tuple[object, float]]:
    """The modules' attributes, what is in their dictionaries and lists, and how often tensors changed."""
    for part in module.modules():
        for value in vars(part).values():
            yield value, _version(value)
            inner = value.values() if isinstance(value, Mapping) else value
            if isinstance(inner, (list, tuple)) or inner is not value:
                yield from ((own, _version(own)) for own in inner)


def _version(value: object) -> float:
    """How often a tensor changed; NaN, which equals nothing, where inference mode does not count."""
    if not isinstance(value, Tensor):
        return 0
    return math.nan if value.is_inference() else value._version
