"""An expert's own class over the resident model: its head is frozen, everything else is the merge.

The class is built from the expert's files. Modules that are the same in the resident model are replaced by
the resident's own, so its hooks, taps, checkpointing and shards work below every head, and the memory is that
of the heads alone.

Legend: `B` examples, `T` tokens.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.utils.output_capturing import (
    install_all_output_capturing_hooks,
    maybe_install_capturing_hooks,
)

from trainmerge.checkpoints import OwnHead, empty_model
from trainmerge.data.batch import Batch, Kind


@dataclass(frozen=True)
class OwnModel:
    """An expert's class over the merged weights, ready for use."""

    module: PreTrainedModel
    kind: Kind
    width: int  # classes, labels or numbers
    names: Mapping[str, int]  # of its classes -> their numbers
    padding: int | None  # the token that its class takes for padding, if it looks for one
    special: Tensor  # the ids of special tokens: no labels are theirs

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The arguments of its class; padding is the token that it looks for."""
        given = {name: value for name, value in batch.inputs.items() if name != "labels"}
        if self.padding is not None and "attention_mask" in given:
            absent = ~given["attention_mask"].bool()
            given["input_ids"] = given["input_ids"].masked_fill(absent, self.padding)
        return given

    def mask(self, batch: Batch) -> Tensor:
        """The positions [B, T] that enter the loss: a token classifier's have no special tokens."""
        present = batch.inputs.get("attention_mask")
        if present is None:
            return batch.mask
        mask = batch.mask if batch.mask.shape == present.shape else present.bool()  # a decoder has another
        if self.kind == "tokens":
            mask = mask & ~torch.isin(batch.inputs["input_ids"], self.special.to(mask.device))
        return mask


def attach(
    head: OwnHead,
    resident: nn.Module,
    names: Mapping[str, str],
    special: Tensor,
    dtype: torch.dtype | None = None,
) -> OwnModel:
    """Build an expert's class over the resident model.

    Args:
        head: The expert's head.
        resident: The model with the merged weights.
        names: The base's tensor -> the resident's parameter.
        special: The ids of special tokens.
        dtype: Of its own parameters; by default the resident's.

    Raises:
        ValueError: see `OwnHead.padding`; or a sharded model whose blocks are not the expert's.
    """
    padding = head.padding
    first = next(resident.parameters())
    dtype = dtype or first.dtype
    config: Any = deepcopy(head.config)
    theirs: Any = resident.config
    config._attn_implementation = theirs._attn_implementation
    module = empty_model(head.kind, config, dtype)
    install_all_output_capturing_hooks(module)  # on blocks of its own; shared ones have the resident's
    if isinstance(resident, PreTrainedModel):
        maybe_install_capturing_hooks(resident)
    Graft(head, resident, names, module, first.device, dtype).run()
    return OwnModel(module, head.outputs, head.config.num_labels or 0, head.labels, padding, special)


class Graft:
    """Puts the resident's modules and parameters into an expert's class."""

    def __init__(
        self,
        head: OwnHead,
        resident: nn.Module,
        names: Mapping[str, str],
        module: PreTrainedModel,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.head, self.module, self.device = head, module, device
        ours = dict(resident.named_parameters(remove_duplicate=False))
        self.modules = dict(resident.named_modules(remove_duplicate=False))
        first = {id(p): name for name, p in module.named_parameters()}
        owners = {name: first[id(p)] for name, p in module.named_parameters(remove_duplicate=False)}
        # every name of a shared parameter -> the resident's parameter
        self.shared = {
            name: ours[names[head.shared[owner]]] for name, owner in owners.items() if owner in head.shared
        }
        places = {
            name: _place(name, names[head.shared[name]]) for name in owners.values() if name in head.shared
        }
        self.ways = list(dict.fromkeys(place for place in places.values() if place is not None))
        self.own: dict[str, Tensor] = {}
        for name, tensor in head.tensors():
            self.own[name] = tensor.to(device, dtype if tensor.is_floating_point() else None, copy=True)
        parameters = {
            owner: nn.Parameter(self.own[owner], requires_grad=False)
            for owner in self.own
            if owner in first.values()
        }
        self.parameters = {name: parameters[owner] for name, owner in owners.items() if owner in parameters}

    @torch.no_grad()
    def run(self) -> None:
        """Replace all that the resident has; what is left gets the expert's own tensors."""
        self._visit(self.module, "")

    def _visit(self, place: nn.Module, path: str) -> None:
        for name, child in list(place._modules.items()):
            inner = f"{path}.{name}" if path else name
            if child is None:
                continue
            twin = next((t for t in self._twins(inner) if self._same(child, inner, t)), None)
            if twin is None:
                self._visit(child, inner)
            else:
                place._modules[name] = twin
        self._fill(place, f"{path}." if path else "")

    def _fill(self, place: nn.Module, start: str) -> None:
        for name, parameter in place._parameters.items():
            if parameter is None:
                continue
            shared = self.shared.get(start + name)
            if shared is not None and _is_sharded(shared):
                raise ValueError(
                    f"model.sharded: {start + name} of {type(self.module).__name__} belongs to a block that "
                    "is another class than the base's: run without model.sharded"
                )
            place._parameters[name] = self.parameters[start + name] if shared is None else shared
        for name, buffer in place._buffers.items():
            if buffer is not None:
                ours = self._buffer(start, name) if start + name in self.head.shared else None
                place._buffers[name] = self.own.get(start + name, buffer if ours is None else ours).to(
                    self.device
                )

    def _buffer(self, start: str, name: str) -> Tensor | None:
        """The resident's buffer of a module that is not the resident's."""
        twins = self._twins(start.removesuffix("."))
        return next((t._buffers[name] for t in twins if t._buffers.get(name) is not None), None)

    def _twins(self, path: str) -> Iterator[nn.Module]:
        """The resident's modules that may be the one at `path` in the expert's class."""
        for added, removed in self.ways:
            if path == added.rstrip("."):
                yield self.modules[removed.rstrip(".")]
            elif path.startswith(added) and removed + path.removeprefix(added) in self.modules:
                yield self.modules[removed + path.removeprefix(added)]

    def _same(self, child: nn.Module, path: str, twin: nn.Module) -> bool:
        """Whether a module is the resident's: the same classes below, and the same parameters and buffers."""
        if not (_buffers(child) or any(True for _ in child.parameters())):
            return False
        theirs = dict(child.named_parameters(remove_duplicate=False))
        ours = dict(twin.named_parameters(remove_duplicate=False))
        if theirs.keys() != ours.keys() or any(
            self.shared.get(f"{path}.{n}") is not p for n, p in ours.items()
        ):
            return False
        return _classes(child) == _classes(twin) and _buffers(child) == _buffers(twin)


def _place(own: str, base: str) -> tuple[str, str] | None:
    """The prefixes in which a parameter's two names differ: `bert.` and nothing."""
    if own.endswith(base) and (own == base or own[: -len(base)].endswith(".")):
        return own[: -len(base)], ""
    return ("", base[: -len(own)]) if base.endswith(f".{own}") else None


def _classes(module: nn.Module) -> list[tuple[str, type]]:
    return [
        (name, next(kind for kind in type(part).__mro__ if not issubclass(kind, FSDPModule)))
        for name, part in module.named_modules(remove_duplicate=False)
    ]


def _buffers(module: nn.Module) -> dict[str, torch.Size]:
    return {name: buffer.shape for name, buffer in module.named_buffers(remove_duplicate=False)}


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")
