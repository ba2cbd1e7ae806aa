"""Where a tensor of the files is in the model's memory: a parameter, or a place in one.

Files of most mixtures of experts have one matrix per expert; transformers holds them in one parameter per
layer. What it does on loading is its own conversion list. A place (`task_vectors.places`) is read from that:
matrices stacked into a new dimension, concatenated, and with dimensions exchanged.

Legend: `E` experts of a layer, `*S` a tensor's shape.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PermuteForRope,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from trainmerge.system.safetensors_file import TensorInfo
from trainmerge.task_vectors.places import parameter_of, view

PLACED = (MergeModulelist, Concatenate, Transpose)  # what a place can say
REORDERED = " with rows in another order"


@dataclass(frozen=True)
class Axis:
    """A dimension of the parameter: one index of it, or the part that a dimension of the tensor fills."""

    source: int | None  # the tensor's dimension; None: one index
    start: int
    size: int

    def text(self, whole: int) -> str:
        """As in a place's name."""
        if self.source is None:
            return str(self.start)
        return ":" if self.start == 0 and self.size == whole else f"{self.start}:{self.start + self.size}"


def renamed(model: PreTrainedModel, names: Sequence[str]) -> dict[str, str]:
    """Names after transformers' renamings for this model; names of tensors that it fuses are unchanged."""
    steps = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    in_model = model.state_dict()
    return {name: rename_source_key(name, steps, [], model.base_model_prefix, in_model)[0] for name in names}


def names_in_memory(
    model: PreTrainedModel, names: Sequence[str], tensors: Mapping[str, TensorInfo]
) -> dict[str, str]:
    """Each tensor's parameter or place after transformers' renamings and conversions.

    Tensors that it converts in other ways are renamed only.
    """
    steps: list[Any] = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    in_model = model.state_dict()
    found: dict[str, str] = {}
    stacked: dict[str, list[_Part]] = {}
    for name in names:
        inside, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, in_model)
        if pattern is None:
            found[name] = inside
            continue
        key = rename_source_key(name, renamings, [], None, None)[0]
        converter = next(step for step in converters if step.rename_source_key(key)[1] is not None)
        if all(type(operation) in PLACED for operation in converter.operations):
            part = _Part(name, tensors[name].shape, pattern, _index(key, pattern), converter)
            stacked.setdefault(inside, []).append(part)
        else:
            found[name] = rename_source_key(name, renamings, [], model.base_model_prefix, in_model)[0]
            if any(isinstance(operation, PermuteForRope) for operation in converter.operations):
                found[name] += REORDERED  # of the same shape: nothing else refuses it
    for inside, parts in stacked.items():
        found |= _placed(inside, in_model.get(inside), parts)
    return found


@dataclass(frozen=True)
class _Part:
    name: str
    shape: Sequence[int]
    pattern: str  # of the conversion's sources
    index: int  # the expert
    converter: WeightConverter


def _placed(inside: str, parameter: Tensor | None, parts: Sequence[_Part]) -> dict[str, str]:
    """The places of the tensors that fill one parameter."""
    if parameter is None:
        return {part.name: inside for part in parts}
    converter = parts[0].converter
    shapes: dict[str, Counter[tuple[int, ...]]] = {}
    for part in parts:
        shapes.setdefault(part.pattern, Counter())[tuple(part.shape)] += 1
    sizes = {pattern: count.most_common(1)[0][0] for pattern, count in shapes.items()}
    order = [pattern for pattern in converter.source_patterns if pattern in sizes]
    found = {}
    for part in parts:
        axes = [Axis(i, 0, size) for i, size in enumerate(sizes[part.pattern])]
        for operation in converter.operations:
            if not (getattr(operation, "check_dims", False) and tuple(part.shape) == tuple(parameter.shape)):
                axes = _after(operation, axes, part, order, sizes)
        found[part.name] = _written(inside, axes, parameter)
    return found


def _after(
    operation: Any, axes: list[Axis], part: _Part, order: Sequence[str], sizes: Mapping[str, Sequence[int]]
) -> list[Axis]:
    """The axes after one more operation of a conversion."""
    if isinstance(operation, MergeModulelist):
        return [*axes[: operation.dim], Axis(None, part.index, 1), *axes[operation.dim :]]
    if isinstance(operation, Transpose):
        turned = list(axes)
        a, b = operation.dim0, operation.dim1
        turned[a], turned[b] = axes[b], axes[a]
        return turned
    at = operation.dim % len(axes)
    source = axes[at].source
    if source is None:
        return axes
    before = sum(sizes[pattern][source] for pattern in order[: order.index(part.pattern)])
    return [*axes[:at], replace(axes[at], start=axes[at].start + before), *axes[at + 1 :]]


def _written(inside: str, axes: Sequence[Axis], parameter: Tensor) -> str:
    """The place's name; the parameter's own if the tensor is the whole of it."""
    if len(axes) != parameter.dim():
        return inside
    order = [axis.source for axis in axes if axis.source is not None]
    turned = order != sorted(order)
    if turned and (axes[-1].source, axes[-2].source) != tuple(sorted(order)[-2:]):
        return f"{inside} with other dimensions exchanged than the last two"
    text = [axis.text(whole) for axis, whole in zip(axes, parameter.shape, strict=True)]
    if not turned and all(part == ":" for part in text):
        return inside
    while len(text) > 1 and text[-1] == ":":
        text.pop()
    return f"{inside}[{','.join(text)}]{'.T' if turned else ''}"


def _index(key: str, pattern: str) -> int:
    """The expert of a tensor, by the star of the conversion's pattern."""
    found = re.search(pattern.replace("*.", r"(\d+)\."), key)
    return int(found.group(1)) if found and found.groups() else 0


def shape_in(inside: str, in_model: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The shape that a tensor of the files must have; empty if the place is outside the parameter."""
    try:
        return tuple(view(inside, in_model[parameter_of(inside)]).shape)
    except IndexError:
        return ()


def uncovered(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Parameters that their places do not fill exactly: an expert's tensor is not in the files, say."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    filled: dict[str, int] = {}
    for name in {*names}:
        if (own := parameter_of(name)) in parameters:
            part = view(name, torch.empty(parameters[own].shape, device="meta"))
            filled[own] = filled.get(own, 0) + part.numel()
    return [name for name, size in filled.items() if size != parameters[name].numel()]
