"""A folder of diffusers: a pipeline with its components in subfolders, or one component. Headers only.

`model_index.json` names the components. Those with weights (unet, transformer, VAE, text encoders) are read
as plain state dicts; the others (scheduler, tokenizers) are files.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from trainmerge.checkpoints.foreign import DIFFUSERS
from trainmerge.checkpoints.weight_files import SAFETENSORS, find_weights, read_folder_json
from trainmerge.system.safetensors_file import MappedFile, TensorInfo
from trainmerge.system.text import listed

INDEX = "model_index.json"
SKILL = "pytorch_lora_weights.safetensors"  # diffusers' name of a LoRA
WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".gguf")
# Keys of a configuration that change no function of the same weights, or that any training may change.
FREE = ("sample_size", "force_upcast", "dtype", "torch_dtype", "num_train_timesteps")
OF_TRANSFORMERS = ("model_type", "hidden_act", "num_attention_heads", "layer_norm_eps")


@dataclass(frozen=True)
class Component:
    """One component with weights: its headers, and its tensors on request."""

    name: str  # its subfolder; empty for a component that is given alone
    path: Path
    stem: str  # of its weight files
    config: Mapping[str, Any]
    files: Mapping[str, MappedFile]

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Name -> header, in file order."""
        return {name: info for file in self.files.values() for name, info in file.tensors.items()}

    @cached_property
    def shards(self) -> dict[str, tuple[str, ...]]:
        """File name -> its tensors."""
        return {name: tuple(file.tensors) for name, file in self.files.items()}

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The mapped tensors by name; nothing is read yet."""
        return {name: file.read(name) for file in self.files.values() for name in file.tensors}

    def differences(self, other: "Component") -> Iterator[str]:
        """The keys of both configurations that differ and make another function of the same weights."""
        named = "_class_name" in self.config
        for key in self.config.keys() & other.config.keys():
            counts = not key.startswith("_") and key not in FREE if named else key in OF_TRANSFORMERS
            if (counts or key == "_class_name") and self.config[key] != other.config[key]:
                yield f"{key} is {other.config[key]!r}, the base's is {self.config[key]!r}"


@dataclass(frozen=True)
class Pipeline:
    """A folder of diffusers, or one component as a pipeline of one."""

    path: Path
    components: Mapping[str, Component]
    scheduler: Mapping[str, Any] = field(default_factory=dict)  # its configuration

    @property
    def single(self) -> bool:
        """Whether it is one component's folder."""
        return "" in self.components

    def full_name(self, component: str, tensor: str) -> str:
        """A tensor's name in the whole pipeline."""
        return f"{component}/{tensor}" if component else tensor

    def split(self, name: str) -> tuple[Component, str]:
        """Undo `full_name`."""
        if self.single:
            return self.components[""], name
        component, _, tensor = name.partition("/")
        return self.components[component], tensor

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Full name -> header."""
        return {
            self.full_name(part.name, name): info
            for part in self.components.values()
            for name, info in part.tensors.items()
        }

    def read(self, name: str) -> Tensor:
        """One tensor by its full name, mapped."""
        part, tensor = self.split(name)
        return part.state[tensor]

    def check_unchanged(self) -> None:
        """Raise ValueError if a weight file changed since it was opened."""
        for part in self.components.values():
            for file in part.files.values():
                file.check_unchanged()


def is_pipeline(path: Path) -> bool:
    """Whether a folder is a pipeline of diffusers, or the folder of one of its components."""
    own = path / "config.json"
    return (path / INDEX).is_file() or (own.is_file() and "_class_name" in read_folder_json(own))


def open_pipeline(path: Path) -> Pipeline:
    """Open a folder of diffusers; no weight is read.

    Raises:
        FileNotFoundError: a component's folder is missing.
        ValueError: a damaged file, an unusual component's name, or weights as variants or pickles only.
    """
    if not (path / INDEX).is_file():
        part = _component("", path)
        if part is None:
            raise FileNotFoundError(f"{path}: no weights. Check the path, or download them again.")
        return Pipeline(path, {"": part})
    names = [
        name
        for name, value in read_folder_json(path / INDEX).items()
        if isinstance(value, list) and any(value) and not name.startswith("_")
    ]
    if strange := [name for name in names if Path(name).name != name or name in (".", "..")]:
        raise ValueError(f"{path / INDEX}: {listed(strange)} are no names of components. Download it again.")
    if absent := [name for name in names if not (path / name).is_dir()]:
        raise FileNotFoundError(
            f"{path}: no folders {listed(absent)}, which {INDEX} names. Download it again."
        )
    parts = {name: part for name in names if (part := _component(name, path / name)) is not None}
    if not parts:
        raise ValueError(f"{path}: no component has weights. Download the pipeline's weights too.")
    settings = path / "scheduler" / "scheduler_config.json"
    return Pipeline(path, parts, read_folder_json(settings) if settings.is_file() else {})


def _component(name: str, path: Path) -> Component | None:
    """A component's headers; None if it has no weights."""
    weights = sorted(file.name for file in path.iterdir() if file.suffix in WEIGHTS and file.is_file())
    if not weights:
        return None
    stem = DIFFUSERS if any(file.startswith(DIFFUSERS) for file in weights) else Path(SAFETENSORS).stem
    plain = (f"{stem}.safetensors", f"{stem}.safetensors.index.json")
    if not any((path / file).is_file() for file in plain):
        raise ValueError(
            f"{path}: neither {plain[0]} nor its shards, and {listed(weights)} are variants or of other "
            "formats. Load the pipeline with diffusers, and save_pretrained(...) without a variant"
        )
    files, _ = find_weights(path, plain[0], f"{stem}.bin", allow_pickle=False)
    config = read_folder_json(path / "config.json")
    return Component(name, path, stem, config, {file.name: MappedFile(file) for file in files})
