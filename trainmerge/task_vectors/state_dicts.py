"""State dicts of one architecture compared: which tensors are merged, which are buffers, which are tied.

Every difference of names, shapes and kinds is in one error. No weight is read, except for integers and ties.
"""

import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainmerge.system.text import listed
from trainmerge.task_vectors.parameter_names import idle_patterns, matches

StateDict = Mapping[str, Tensor]

STATISTICS = re.compile(r"(^|\.)(running_mean|running_var|num_batches_tracked)$")
MERGED_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
REMEDY = "leave a tensor out with `ignore`, if it need not be merged"


@dataclass(frozen=True)
class Compared:
    """State dicts that match. Tensors in neither of the first three keep the base's value."""

    parameters: tuple[str, ...]  # merged, in the base's order, tied ones under one name
    ties: Mapping[str, str]  # further name of a tied parameter -> its name in `parameters`
    buffers: tuple[str, ...]  # not merged: batch norms' statistics, and those that the caller names
    experts: Mapping[str, StateDict]  # their parameters and buffers, by the base's names


def compare_state_dicts(
    base: StateDict, experts: Mapping[str, StateDict], ignore: Sequence[str], buffers: Collection[str]
) -> Compared:
    """Compare experts with the base. `ignore` are fnmatch patterns; `buffers` are names.

    Raises:
        TypeError: something other than state dicts.
        ValueError: lists every name of one side only, every other shape, quantised weights, integers that
            differ, ties that an expert broke, and patterns that match nothing.
    """
    if not experts:
        raise ValueError("no experts: give at least one, {name: state_dict}")
    sides = {"base": base, **{f"expert {name}": own for name, own in experts.items()}}
    if other := [f"{side} is {type(own).__name__}" for side, own in sides.items() if not _is_state(own)]:
        raise TypeError(f"{'; '.join(other)}: give a state dict, such as module.state_dict()")
    names = dict.fromkeys(name for side in sides.values() for name in side)
    problems = [f"ignore: {pattern!r} matches no tensor" for pattern in idle_patterns(ignore, names)]
    kept = {side: _without(state, ignore) for side, state in sides.items()}
    for side, state in kept.items():
        problems += [f"{side}: {line}" for line in _strange(state)]
    if not problems:
        ties = _ties(kept["base"])
        found = {name: _renamed(kept[f"expert {name}"], kept["base"], ties) for name in experts}
        for name, own in found.items():
            problems += [f"expert {name}: {line}" for line in _mismatches(kept["base"], own, ties, buffers)]
    if problems:
        lines = "\n".join(f"  {line}" for line in problems)
        raise ValueError(f"{len(problems)} mismatches of state dicts:\n{lines}\n{REMEDY}")
    still = [name for name in kept["base"] if name in buffers or STATISTICS.search(name)]
    parameters = [n for n, t in kept["base"].items() if t.is_floating_point() and n not in {*still, *ties}]
    _warn_of_dtypes(base, found, parameters)
    return Compared(tuple(parameters), ties, tuple(still), found)


def _is_state(given: Any) -> bool:
    return isinstance(given, Mapping) and all(isinstance(name, str) for name in given)


def _without(state: StateDict, ignore: Sequence[str]) -> dict[str, Tensor]:
    """A state dict without ignored tensors, detached."""
    return {
        name: tensor.detach() if isinstance(tensor, Tensor) else tensor
        for name, tensor in state.items()
        if not matches(name, ignore)
    }


def _strange(state: Mapping[str, Any]) -> Iterator[str]:
    """Entries that no merge can take."""
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            yield f"{name} is {type(tensor).__name__}, not a tensor"
        elif tensor.layout != torch.strided or tensor.is_quantized:
            yield f"{name} is sparse or quantised; give the ordinary tensor"
        elif tensor.is_floating_point() and tensor.dtype not in MERGED_DTYPES:
            yield f"{name} is {tensor.dtype}, a quantised weight; give the weights that were quantised"


def _ties(state: StateDict) -> dict[str, str]:
    """Each further name of a tensor with several -> its first name."""
    first: dict[object, str] = {}
    ties = {}
    for name, tensor in state.items():
        if tensor.numel() and tensor.is_floating_point():
            owner = first.setdefault(_place(tensor), name)
            if owner != name:
                ties[name] = owner
    return ties


def _place(tensor: Tensor) -> object:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _renamed(own: StateDict, base: StateDict, ties: Mapping[str, str]) -> StateDict:
    """An expert's tensors, where one name of several is enough.

    Files have a tied tensor under one of its names, modules under all of them.
    """
    found = dict(own)
    for name, owner in ties.items():
        if owner not in found and name in found:
            found[owner] = found[name]
        if name not in found and owner in found:
            found[name] = found[owner]
    known = {_place(tensor) for name, tensor in found.items() if name in base and tensor.numel()}
    return {name: tensor for name, tensor in found.items() if name in base or _place(tensor) not in known}


def _mismatches(
    base: StateDict, own: StateDict, ties: Mapping[str, str], buffers: Collection[str]
) -> Iterator[str]:
    """One line per group of differences from the base."""
    if missing := [name for name in base if name not in own]:
        yield f"lacks {listed(missing)}, which the base has"
    if extra := [name for name in own if name not in base]:
        yield f"has {listed(extra)}, which the base lacks"
    for name, tensor in base.items():
        if name not in own:
            continue
        theirs = own[name]
        if theirs.shape != tensor.shape:
            yield f"{name} is {tuple(theirs.shape)}, the base's is {tuple(tensor.shape)}"
        elif theirs.is_floating_point() != tensor.is_floating_point():
            yield f"{name} is {theirs.dtype}, the base's is {tensor.dtype}"
        elif not (tensor.is_floating_point() or _buffer(name, buffers) or _equal(theirs, tensor)):
            yield f"{name} is {tensor.dtype}, which cannot be merged, and differs from the base's"
    for name, owner in ties.items():
        if name in own and owner in own and not _equal(own[name], own[owner]):
            yield f"{name} and {owner} are one tensor in the base, and differ here: untie them in the base"


def _buffer(name: str, buffers: Collection[str]) -> bool:
    return name in buffers or bool(STATISTICS.search(name))


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    return _place(ours) == _place(theirs) or torch.equal(ours.cpu(), theirs.cpu())


def _warn_of_dtypes(base: StateDict, experts: Mapping[str, StateDict], names: Sequence[str]) -> None:
    for expert, own in experts.items():
        pairs = {(str(own[name].dtype), str(base[name].dtype)) for name in names}
        mixed = ", ".join(f"{theirs} against {ours}" for theirs, ours in sorted(pairs) if theirs != ours)
        if mixed:
            warnings.warn(
                f"expert {expert} and the base differ in dtype: {mixed}; differences are taken in float32",
                stacklevel=4,
            )
