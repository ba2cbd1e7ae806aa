"""One block's error to each expert's outputs, on the inputs that the model merged so far gives it.

Legend: `K` experts, `G` coefficient groups, `R` rows (tokens without padding), `H` outputs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trainmerge.data.batch import Batch
from trainmerge.kernels import accumulation_dtype
from trainmerge.model.hooks import hooked
from trainmerge.model.loss_scale import LossScale, scaled_gradients
from trainmerge.model.merged_model import MergedModel
from trainmerge.model.resident import Resident
from trainmerge.task_vectors.places import is_place


@dataclass(frozen=True)
class Call:
    """One call of a block in the merged model, and what the expert's block gave."""

    given: tuple[Any, ...]
    named: Mapping[str, Any]
    target: Tensor  # [R, H]
    kept: Tensor | None  # [B, T]: rows that are not padding; None where all count
    weight: float = 0.0  # of a row


@dataclass(frozen=True)
class BlockOutputs:
    """The calls of one block on all examples; see `Measures.block`."""

    module: nn.Module
    places: Mapping[str, str]  # parameter's name -> its name in the module
    calls: Sequence[Call]

    def __call__(self, weights: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """The error with these weights, and its gradient."""
        own = dict(self.module.named_parameters())
        leaves = {
            name: weight.detach().to(own[self.places[name]]).requires_grad_()
            for name, weight in weights.items()
        }
        total, scale = 0.0, LossScale.of(self.module)
        sums = {n: torch.zeros_like(x, dtype=accumulation_dtype(x.dtype)) for n, x in leaves.items()}
        given = {self.places[name]: leaf for name, leaf in leaves.items()}
        for call in self.calls:
            with torch.enable_grad():
                rows = _rows(functional_call(self.module, given, call.given, dict(call.named)), call.kept)
                error = call.weight * (rows - call.target).to(accumulation_dtype(rows.dtype)).square().sum()
            found = scaled_gradients(error, [*leaves.values()], scale)
            total += float(error.detach())
            for kept, gradient in zip(sums.values(), found, strict=True):
                if gradient is not None:
                    kept += gradient
        return total, sums


def measure_block(
    resident: Resident,
    names: Sequence[str],
    values: Tensor,
    batches: Callable[[int], Iterable[Batch]],
    weights: Sequence[float],
) -> BlockOutputs | None:
    """The error of the block of these parameters; None if no module has them all, or it is not called.

    None also for the layer that gives a language model's logits: as wide as a vocabulary they fill a memory.

    Its inputs, in the merge with coefficients `values` [K, G], and targets on all examples are in memory.
    Each expert's `batches` are run twice through the whole model.
    """
    found = block_module(resident.merged, names)
    calls: list[Call] = []
    if found is None or found[0] is _output_layer(resident.merged.module):
        return None
    for expert, weight in enumerate(weights):
        with resident.merged.teacher(expert):
            own = _calls(resident, found[0], batches(expert))
        with resident.merged.at(values):
            merged = _calls(resident, found[0], batches(expert))
        count = sum(len(call.target) for call in own)
        calls += [
            replace(call, target=told.target, weight=weight / count)
            for call, told in zip(merged, own, strict=True)
        ]
    return BlockOutputs(*found, calls) if calls else None


def _output_layer(module: nn.Module) -> nn.Module | None:
    layer: nn.Module | None = getattr(module, "get_output_embeddings", lambda: None)()
    return layer


def block_module(merged: MergedModel, names: Iterable[str]) -> tuple[nn.Module, dict[str, str]] | None:
    """The smallest module with all these parameters, and their names there.

    None if that is the whole model, or if one is only a part of its parameter.
    """
    inside = {name: merged.placed.inside[name] for name in names}
    parts = [place.split(".")[:-1] for place in inside.values()]
    same = takewhile(lambda level: len({*level}) == 1, zip(*parts, strict=False))
    path = ".".join(level[0] for level in same)
    if not path or any(map(is_place, inside.values())):
        return None
    places = {name: place[len(path) + 1 :] for name, place in inside.items()}
    return merged.module.get_submodule(path), places


def _calls(resident: Resident, module: nn.Module, batches: Iterable[Batch]) -> list[Call]:
    """A module's calls in forward passes with the current weights."""
    calls: list[Call] = []
    for batch in batches:
        with recording(module, batch.inputs.get("attention_mask"), calls):
            resident(batch)
    return calls


@contextmanager
def recording(module: nn.Module, mask: Tensor | None, calls: list[Call]) -> Iterator[None]:
    """Add the calls of this module in a forward pass, with its outputs as targets."""
    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def copy(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        # a model may go on to change the states in place
        inputs.append((tuple(map(_copied, given)), {name: _copied(value) for name, value in named.items()}))

    def record(_: nn.Module, __: tuple[Any, ...], outputs: Any) -> None:
        first = _first(outputs)
        padded = mask is not None and first.shape[:-1] == mask.shape
        kept = mask.bool() if mask is not None and padded else None
        calls.append(Call(*inputs.pop(), _rows(outputs, kept).detach().clone(), kept))

    hooks = module.register_forward_pre_hook(copy, with_kwargs=True), module.register_forward_hook(record)
    with hooked(hooks):
        yield


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _first(outputs: Any) -> Tensor:
    """The hidden states of a block's outputs."""
    states: Tensor = outputs if isinstance(outputs, Tensor) else outputs[0]
    return states


def _rows(outputs: Any, kept: Tensor | None) -> Tensor:
    """[R, H] of the rows that count."""
    states = _first(outputs)
    return states[kept] if kept is not None else states.flatten(0, -2)
