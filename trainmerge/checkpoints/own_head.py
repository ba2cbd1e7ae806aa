"""The places of an expert's own head: its class, and for each of its parameters the base's or its own tensor.

It is found from headers and config.json, after `find_sources` has decided what is merged.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from trainmerge.checkpoints.adapter import Adapter, open_adapter
from trainmerge.checkpoints.adapter_head import class_of_adapter
from trainmerge.checkpoints.full_expert import fitted_names
from trainmerge.checkpoints.head_parts import may_have_head, own_parameters
from trainmerge.checkpoints.meta_model import canonical_names, shorten
from trainmerge.checkpoints.output import Output, output_of_class
from trainmerge.checkpoints.parameters import Parameters, open_parameters
from trainmerge.checkpoints.reader import Checkpoint, open_checkpoint
from trainmerge.checkpoints.sources import FullSource, OpenedFiles, Sources
from trainmerge.checkpoints.weight_files import ADAPTER

OF_FILES = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
)  # keys of where and how it is stored


@dataclass(frozen=True)
class OwnHead:
    """One expert's class over the merged weights.

    Args:
        folder: The expert's.
        kind: Its class.
        config: Its configuration, with dropout 0.
        config_file: Where that is from: the expert's, or the base's for an adapter.
        shared: Parameter or buffer of the class -> the base's tensor that it is.
        own: Parameter or buffer of the class -> its place in the expert's files.
        absent: Parameters of the class that are in no file.
    """

    folder: Path
    kind: type[PreTrainedModel]
    config: PreTrainedConfig
    config_file: Path
    shared: Mapping[str, str]
    own: Mapping[str, FullSource]
    absent: Sequence[str] = ()

    def check(self) -> None:
        """Raise ValueError if a parameter is neither the base's nor in the expert's files."""
        if self.absent:
            raise ValueError(
                f"{self.folder}: {self.kind.__name__} has parameters that neither its files nor the base's "
                f"have, so they would be random: {shorten(self.absent)}. Save the expert with the class that "
                "it was trained with, or set the expert's `head`"
            )

    @property
    def output(self) -> Output:
        """What its class puts out."""
        return output_of_class(self.kind, self.config)

    @property
    def labels(self) -> dict[str, int]:
        """The names of its classes -> their numbers."""
        return {str(name): int(i) for i, name in (self.config.id2label or {}).items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every own parameter and buffer, mapped."""
        files = OpenedFiles()
        for name, place in self.own.items():
            yield name, files.read(place.file, place.tensor)

    def identity(self) -> str:
        """Its class and everything in config.json that its function may depend on; files have checksums."""
        told = {key: value for key, value in self.config.to_dict().items() if key not in OF_FILES}
        return f"own {self.kind.__name__} {json.dumps(told, sort_keys=True, default=str)}"


def find_own_heads(
    base: Checkpoint, experts: Mapping[str, Path], sources: Sources, ignore: Sequence[str] = ()
) -> dict[str, OwnHead]:
    """The experts that have a head of their own, whose tensors `sources` do not merge."""
    found: dict[str, OwnHead] = {}
    frame: Parameters | None = None
    for name, folder in experts.items():
        if not may_have_head(folder):
            continue
        frame = frame or open_parameters(base, ignore)
        merged = sources.experts[name]
        pickled = any(str(getattr(s, "file", "")).endswith(".bin") for s in merged.values())
        if (folder / ADAPTER).is_file():
            head = _of_adapter(open_adapter(frame, folder, ignore, pickled, whole_head=True), frame, merged)
        else:
            own = open_parameters(open_checkpoint(folder, pickled), ignore)
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
