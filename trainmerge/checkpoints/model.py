"""A checkpoint as a transformers module that owns its weights.

transformers builds only the modules and their buffers. It would initialise absent tensors at random, so names
and shapes are compared first, and the weights are copied here.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from trainmerge.checkpoints.computed_positions import computed_parameters
from trainmerge.checkpoints.meta_model import build_meta_model, quiet, shorten
from trainmerge.checkpoints.reader import Checkpoint
from trainmerge.checkpoints.side_layers import attach_side_layers
from trainmerge.checkpoints.tensor_names import locate, memory_names
from trainmerge.system.safetensors_file import TensorInfo
from trainmerge.task_vectors.parameter_names import matches
from trainmerge.task_vectors.places import is_place, parameter_of, view


@dataclass(frozen=True)
class LoadedModel:
    """A model that owns its weights, and the parameter of each tensor in the files."""

    module: nn.Module
    names: Mapping[str, str]  # name in the checkpoint -> the parameter's or place's; tied ones share one
    buffers: Mapping[str, str] = field(default_factory=dict)  # name in the checkpoint -> the buffer's


def load_model(base: Checkpoint, ignore: Sequence[str] = ()) -> LoadedModel:
    """The resident model: on the CPU, in the files' dtypes, dropout 0, eval mode, no gradients.

    `ignore` are fnmatch patterns of parameters that the files may lack (randomly initialised, such as an
    unused pooler) and of tensors that the model may lack.

    Raises ValueError, before a weight is read, if the architecture is unknown, a tensor of the files is
    neither parameter nor buffer of the model, a shape differs, or a parameter is in no file.
    """
    meta_model, names = check_tensors(base.path, base.tensors, ignore)
    first = _first_dtype(base)
    state = {name: base.read(name) for name in base.tensors}
    with quiet():
        module = type(meta_model).from_pretrained(
            None, config=meta_model.config, state_dict=state, dtype=first
        )
    module.train(False).requires_grad_(False)
    parameters = dict(module.named_parameters())
    for name, dtype in _stacked_dtypes(base, names).items():
        parameters[name].data = parameters[name].data.to(dtype)
    for name, inside in names.items():
        if is_place(inside):
            view(inside, parameters[parameter_of(inside)].data).copy_(base.read(name))
            continue
        parameters[inside].data = torch.empty(0)  # free the old storage first: never two of the largest
        parameters[inside].data = base.read(name).clone()  # the file's dtype, in private memory
    for buffer in module.buffers():
        buffer.data = buffer.data.clone()
    return LoadedModel(module, names | attach_side_layers(module, base), _buffers(module, base))


@torch.no_grad()
def load_meta_model(base: Checkpoint, ignore: Sequence[str] = ()) -> LoadedModel:
    """The same model with parameters on the meta device, in the files' dtypes, and its buffers in memory.

    At most one parameter is allocated at a time, and none of its pages is touched. Raises as `load_model`.
    """
    meta_model, names = check_tensors(base.path, base.tensors, ignore)
    module = empty_model(type(meta_model), meta_model.config, _first_dtype(base))
    buffers, parameters = dict(module.named_buffers()), dict(module.named_parameters())
    stored = _buffers(module, base)
    for name, inside in stored.items():
        buffers[inside].copy_(base.read(name))
    for name, inside in names.items():
        if not is_place(inside):
            parameters[inside].data = torch.empty_like(base.read(name), device="meta")
    for name, dtype in _stacked_dtypes(base, names).items():
        parameters[name].data = torch.empty_like(parameters[name], dtype=dtype, device="meta")
    return LoadedModel(module, names | attach_side_layers(module, base, "meta"), stored)


def _buffers(module: PreTrainedModel, base: Checkpoint) -> dict[str, str]:
    """Name in the checkpoint -> the buffer's."""
    known = {name for name, _ in module.named_buffers()}
    return {name: own for name, own in memory_names(module, base.tensors).items() if own in known}


def empty_model(kind: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model with parameters on the meta device and computed buffers in memory; eval mode, no gradients."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as transformers does
    try:
        with quiet(), no_init_weights(), _parameters_on_meta():
            module = kind(config)
            module.tie_weights()
    finally:
        torch.set_default_dtype(default)
    module.train(False).requires_grad_(False)
    return module


def check_tensors(
    path: Path, tensors: Mapping[str, TensorInfo], ignore: Sequence[str] = ()
) -> tuple[PreTrainedModel, dict[str, str]]:
    """The model of a folder's config.json on the meta device, and where in it each of the tensors is.

    Raises ValueError if a tensor is neither parameter nor buffer of the model, a shape differs, or a
    parameter is none of them.
    """
    meta_model = build_meta_model(path)
    names = locate(meta_model, path, tensors, ignore)
    there = {parameter_of(inside) for inside in names.values()}
    absent = [name for name, _ in meta_model.named_parameters() if name not in there]
    computed = {*(meta_model._keys_to_ignore_on_save or ()), *computed_parameters(meta_model)}
    absent = [name for name in absent if not matches(name, ignore) and name not in computed]
    if absent:
        raise ValueError(
            f"{path}: {type(meta_model).__name__} has parameters that the files lack and that would be "
            f"randomly initialised: {shorten(absent)}. If its output doesn't use them, name them in "
            "`ignore`; otherwise save the checkpoint with the class that it was trained with."
        )
    return meta_model, names


def _stacked_dtypes(base: Checkpoint, names: Mapping[str, str]) -> dict[str, torch.dtype]:
    """The dtype of every parameter that several tensors of the files fill: the widest of theirs."""
    found: dict[str, torch.dtype] = {}
    for name, inside in names.items():
        if is_place(inside):
            own, dtype = parameter_of(inside), base.tensors[name].dtype
            found[own] = torch.promote_types(found.get(own, dtype), dtype)
    return found


def _first_dtype(base: Checkpoint) -> torch.dtype:
    return next(info.dtype for info in base.tensors.values() if info.dtype.is_floating_point)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """In this context registered parameters move to the meta device; buffers keep their computed values."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one on the meta device is being tied
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
