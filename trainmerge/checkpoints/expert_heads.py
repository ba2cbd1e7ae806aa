"""Find experts' own heads from headers and config.json, after `find_sources` has decided what is merged."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from trainmerge.checkpoints.adapter import Adapter, open_adapter
from trainmerge.checkpoints.adapter_head import class_of_adapter
from trainmerge.checkpoints.full_expert import fitted_names
from trainmerge.checkpoints.head_parts import may_have_head, own_parameters
from trainmerge.checkpoints.own_head import OwnHead
from trainmerge.checkpoints.parameters import Parameters, open_parameters
from trainmerge.checkpoints.reader import Checkpoint, open_checkpoint
from trainmerge.checkpoints.sources import FullSource, Sources
from trainmerge.checkpoints.tensor_names import canonical_names
from trainmerge.checkpoints.weight_files import ADAPTER


def find_own_heads(
    base: Checkpoint,
    experts: Mapping[str, Path],
    sources: Sources,
    ignore: Sequence[str] = (),
    allow_pickle: bool = False,
) -> dict[str, OwnHead]:
    """The experts that have a head of their own, whose tensors `sources` do not merge."""
    found: dict[str, OwnHead] = {}
    frame: Parameters | None = None
    for name, folder in experts.items():
        if not may_have_head(folder):
            continue
        frame = frame or open_parameters(base, ignore)
        merged = sources.experts[name]
        if (folder / ADAPTER).is_file():
            head = _of_adapter(
                open_adapter(frame, folder, ignore, allow_pickle, whole_head=True), frame, merged
            )
        else:
            own = open_parameters(open_checkpoint(folder, allow_pickle), ignore)
            head = _of_full(own, frame, merged)
        if head:
            found[name] = head
    return found


def _of_adapter(adapter: Adapter, frame: Parameters, merged: Mapping[str, object]) -> OwnHead | None:
    """The own head of an adapter; `merged` are the base's tensors that it changes."""
    apart = {key: name for key, name in adapter.own.items() if not _is_bases(adapter, key, frame, merged)}
    if not apart:
        return None
    shapes = {key: adapter.source.tensors[name].shape for key, name in apart.items()}
    model = class_of_adapter(frame, adapter.path, adapter.config, shapes)
    fitted = fitted_names(model, [name for name, _ in model.named_parameters()], frame)
    tensors = canonical_names(frame.names)
    shared = {name: tensors[key] for key, name in fitted.items() if key in tensors and name not in apart}
    places = {key: FullSource(str(adapter.source.tensors[name].file), name) for key, name in apart.items()}
    absent = absent_parameters(model, {*shared, *places})
    file = frame.checkpoint.path / "config.json"
    return OwnHead(adapter.path, type(model), model.config, file, shared, places, absent)


def _is_bases(adapter: Adapter, key: str, frame: Parameters, merged: Mapping[str, object]) -> bool:
    """Whether a tensor of a head is merged into the base's, or is the base's."""
    name, read = frame.file_of(key), adapter.source.read(adapter.own[key])
    if name is None:
        return False
    ours = frame.checkpoint.read(name)
    return name in merged or (ours.shape == read.shape and torch.equal(ours.to(read.dtype), read))


def _of_full(own: Parameters, frame: Parameters, merged: Mapping[str, object]) -> OwnHead | None:
    """The own head of a full expert; `merged` are the base's tensors that it changes."""
    fitted = fitted_names(own.meta_model, own.names.values(), frame)
    kept = {name for key, name in fitted.items() if frame.files.get(key) in merged}
    apart = own_parameters(own, frame, fitted, whole=True) - kept
    if not apart:
        return None
    tensors = canonical_names(frame.names)
    shared = {name: tensors[key] for key, name in fitted.items() if key in tensors and name not in apart}
    folder, model, files = own.checkpoint.path, own.meta_model, own.checkpoint.tensors
    places = {name: FullSource(str(files[own.files[name]].file), own.files[name]) for name in apart}
    absent = absent_parameters(model, {*shared, *places})
    ours = frame.buffers
    for inside, tensor in own.buffers.items():
        start = f"{model.base_model_prefix}."
        twin = next((n for n in (inside, start + inside, inside.removeprefix(start)) if n in ours), None)
        if twin is None:
            places[inside] = FullSource(str(files[tensor].file), tensor)
        else:
            shared[inside] = ours[twin]
    return OwnHead(folder, type(model), model.config, folder / "config.json", shared, places, absent)


def absent_parameters(model: PreTrainedModel, known: set[str]) -> list[str]:
    """The parameters of a class that are not among the `known` ones, nor computed."""
    known = known | set(model._keys_to_ignore_on_save or ())
    return [name for name, _ in model.named_parameters() if name not in known]
