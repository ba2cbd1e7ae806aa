"""A model whose blocks are in memory only while they run; embeddings, head and norms outside stay."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from trainmerge.checkpoints import Checkpoint, LoadedModel
from trainmerge.model.hooks import hooked
from trainmerge.task_vectors.parameter_names import number_of
from trainmerge.task_vectors.places import is_place, parameter_of, view


@contextmanager
def streamed(loaded: LoadedModel, base: Checkpoint) -> Iterator[nn.Module]:
    """In this context a model of `load_meta_model` runs: a block's weights are read for each of its forwards.

    Its memory is one block's, and the parameters outside of blocks.
    """
    module = loaded.module
    sources: dict[str, list[str]] = {}
    for name, inside in loaded.names.items():
        sources.setdefault(parameter_of(inside), []).append(name)
    blocks: dict[str, list[str]] = {}
    outside = []
    for parameter in sources:
        numbered = number_of(parameter)
        if numbered:
            blocks.setdefault(f"{numbered[0]}.{numbered[1]}", []).append(parameter)
        else:
            outside.append(parameter)
    read = partial(_read, module, loaded.names, base, sources)
    handles = []
    for block, parameters in blocks.items():
        place = module.get_submodule(block)
        handles += [
            place.register_forward_pre_hook(lambda *_, parameters=parameters: read(parameters)),
            place.register_forward_hook(lambda *_, parameters=parameters: _drop(module, parameters)),
        ]
    read(outside)
    own: Any = module
    own.tie_weights()
    try:
        with hooked(handles):
            yield module
    finally:
        _drop(module, outside)


def _read(
    module: nn.Module,
    names: Mapping[str, str],
    base: Checkpoint,
    sources: Mapping[str, list[str]],
    parameters: list[str],
) -> None:
    for parameter in parameters:
        meta = module.get_parameter(parameter)
        if not is_place(names[sources[parameter][0]]):
            own = base.read(sources[parameter][0]).clone()
        else:
            own = torch.empty(meta.shape, dtype=meta.dtype)
            for name in sources[parameter]:
                view(names[name], own).copy_(base.read(name))
        _put(module, parameter, own)


def _drop(module: nn.Module, parameters: list[str]) -> None:
    for parameter in parameters:
        own = module.get_parameter(parameter)
        _put(module, parameter, torch.empty_like(own, device="meta"))


def _put(module: nn.Module, parameter: str, tensor: torch.Tensor) -> None:
    place, _, name = parameter.rpartition(".")
    module.get_submodule(place).register_parameter(name, nn.Parameter(tensor, requires_grad=False))
