"""The values of a mergekit parameter: a number, a gradient over the layers, or values by tensor name.

weight: 0.5
weight: [0, 1]                                     # interpolated over the depth
weight: [{filter: mlp, value: [0, 1]}, {value: 0.3}]   # the first filter inside the tensor's name counts
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainmerge.task_vectors.parameter_names import number_of

Number = float | bool


@dataclass(frozen=True)
class Place:
    """Where a parameter is in the network."""

    name: str
    depth: float  # 0 in the first block, 1 in the last; 0 outside blocks


def parameter_places(names: Sequence[str]) -> dict[str, Place]:
    """The place of each parameter; the depth is that of its block in its own stack of blocks.

    >>> found = parameter_places([f"model.layers.{i}.w" for i in range(3)] + ["lm_head.weight"])
    >>> [place.depth for place in found.values()]
    [0.0, 0.5, 1.0, 0.0]
    """
    blocks = {name: number_of(name) for name in names}
    last: dict[str, int] = {}
    for stack, number in filter(None, blocks.values()):
        last[stack] = max(last.get(stack, 0), number)
    return {
        name: Place(name, block[1] / max(1, last[block[0]]) if block else 0.0)
        for name, block in blocks.items()
    }


def value_at(value: Any, place: Place) -> Number | None:
    """A parameter's value for a tensor; None if no filter is in its name.

    A gradient is interpolated linearly between equidistant points; one of true and false takes the point
    before. Outside blocks it is its first point.

    >>> value_at([0, 1, 0.4], Place("layers.3.mlp.w", 0.75))
    0.7
    >>> value_at([{"filter": "mlp", "value": 2}, {"value": 3}], Place("layers.3.attn.w", 0.75))
    3.0
    """
    if not isinstance(value, list):
        return value if isinstance(value, bool) else float(value)
    if value and isinstance(value[0], Mapping):
        inside = [each["value"] for each in value if _inside(each.get("filter"), place.name)]
        return value_at(inside[0], place) if inside else None
    at = place.depth * (len(value) - 1)
    low = min(int(at + 1e-9), len(value) - 1)
    high = min(low + 1, len(value) - 1)
    if isinstance(value[low], bool):
        return bool(value[low])
    share = max(at - low, 0.0)
    return float(value[low]) if share < 1e-9 else (1 - share) * value[low] + share * value[high]


def _inside(part: str | None, name: str) -> bool:
    """Whether a filter chooses a tensor: a part of its name, or `*`."""
    return part in (None, "*") or str(part) in name


def setting_fault(value: Any, kind: type) -> str:
    """What is wrong with a parameter's value in a file; empty if nothing is."""
    if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        for each in value:
            if extra := each.keys() - {"filter", "value"}:
                return f"has the key {sorted(map(str, extra))[0]!r}; a filter's keys are `filter` and `value`"
            if "value" not in each or isinstance(each["value"], Mapping):
                return f"has a filter without a usable value: {each!r}"
            if not isinstance(each.get("filter", ""), str | None):
                return f"has the filter {each['filter']!r}; write a part of the tensors' names, or '*'"
            nested = isinstance(each["value"], list) and any(isinstance(v, Mapping) for v in each["value"])
            if nested or (found := setting_fault(each["value"], kind)):
                return found if not nested else "has a filter inside a filter"
        return ""
    points = value if isinstance(value, list) else [value]
    for point in points:
        if kind is bool and not isinstance(point, bool):
            return f"is {point!r}, not true or false"
        if kind is not bool and (isinstance(point, bool) or not isinstance(point, int | float)):
            return f"is {point!r}, not a number"
        if kind is not bool and not abs(point) < float("inf"):
            return f"is {point!r}, not a finite number"
    return "" if points else "is an empty list"
