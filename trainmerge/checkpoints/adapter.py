"""A peft adapter folder on disk: its config and its tensors, under the base's module names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor

from trainmerge.checkpoints.adapter_config import check_adapter_config
from trainmerge.checkpoints.meta_model import quiet, shorten
from trainmerge.checkpoints.parameters import Parameters, fit_prefix
from trainmerge.checkpoints.reader import PickleFile, WeightFile
from trainmerge.checkpoints.weight_files import find_weights, read_json
from trainmerge.system.safetensors_file import MappedFile, TensorInfo
from trainmerge.task_vectors.parameter_names import matches

ROOT = "base_model.model."  # peft's name for the model that it wraps
MARKS = {
    "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "token_adapter",
    "base_layer",
}  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """An adapter's headers. Keys are peft's without `base_model.model.`, and with the base's own prefix."""

    path: Path
    config: Mapping[str, Any]  # adapter_config.json
    keys: Mapping[str, str]  # key -> its name in the file
    source: WeightFile
    ignored: Mapping[str, str] = field(default_factory=dict)  # the same of `ignore`d tensors of the base

    def info(self, key: str) -> TensorInfo:
        """The header of one tensor."""
        return self.source.tensors[self.keys[key]]

    def read(self, key: str) -> Tensor:
        """One tensor, mapped."""
        return self.source.read(self.keys[key])

    def peft_config(self, **changes: Any) -> PeftConfig:
        """The config as peft's object, with changes."""
        values = {**self.config, **changes}
        kind = PEFT_TYPE_TO_CONFIG_MAPPING[values["peft_type"]]
        known = {field.name for field in fields(kind)}
        with quiet():
            return kind(**{name: value for name, value in values.items() if name in known})


def open_adapter(base: Parameters, path: Path, ignore: Sequence[str], allow_pickle: bool) -> Adapter:
    """Open an adapter folder, headers only; `ignore`d tensors are left out.

    Raises FileNotFoundError or ValueError for a damaged folder, for fields and types unknown to the installed
    peft, for prompt tuning (it changes inputs, not weights), and for tensors of modules that the base lacks.
    """
    config = read_json(path / "adapter_config.json")
    check_adapter_config(path / "adapter_config.json", config)
    _check_config(path, config)
    files, _ = find_weights(path, "adapter_model.safetensors", "adapter_model.bin", allow_pickle)
    source: WeightFile = PickleFile(files[0]) if files[0].suffix == ".bin" else MappedFile(files[0])
    strange = [name for name in source.tensors if not name.startswith(ROOT)]
    if strange:
        raise ValueError(f"{files[0]}: {shorten(strange)} are outside {ROOT!r}: not a supported adapter.")
    modules = {name for name, _ in base.meta_model.named_modules() if name}
    own = {name: name.removeprefix(ROOT) for name in source.tensors}
    places = {name: module_of(key) for name, key in own.items()}
    fits = fit_prefix(places.values(), modules, [base.meta_model.base_model_prefix])
    keys, ignored = {}, {}
    for name, place in places.items():
        key = fits[place] + own[name].removeprefix(place)
        if not matches(key, ignore) and not matches(own[name], ignore):
            keys[key] = name
        elif fits[place] in modules:
            ignored[key] = name
    _check_modules(files[0], list(keys), modules)
    return Adapter(path, config, keys, source, ignored)


def module_of(key: str) -> str:
    """The module of a tensor: its name up to `.lora_A` and similar, or up to the last dot."""
    words = key.split(".")
    ends = [i for i, word in enumerate(words) if word in MARKS]
    return ".".join(words[: ends[0]] if ends else words[:-1])


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    file, peft_type = path / "adapter_config.json", config.get("peft_type")
    if peft_type not in list(PEFT_TYPE_TO_CONFIG_MAPPING):
        raise ValueError(f"{file}: peft_type {peft_type!r} is unknown to the installed peft; upgrade peft.")
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]
    known = {field.name for field in fields(kind)}
    # An unknown field that is off changes nothing.
    unknown = sorted(name for name, value in config.items() if name not in known and value)
    if unknown:
        raise ValueError(
            f"{file}: fields {', '.join(unknown)} are unknown to the installed peft, which may misread the "
            "adapter; upgrade peft."
        )
    try:
        with quiet():
            parsed = kind(**{name: value for name, value in config.items() if name in known})
    except Exception as error:  # of many types, for a file that is a stranger's
        raise ValueError(f"{file}: peft rejects it: {error}") from error
    if parsed.is_prompt_learning or parsed.is_adaption_prompt:
        raise ValueError(f"{file}: {peft_type} changes inputs, not weights; it cannot be merged.")


def _check_modules(file: Path, keys: Sequence[str], modules: set[str]) -> None:
    absent: dict[str, list[str]] = {}
    for key in keys:
        place = module_of(key)
        if place not in modules:
            absent.setdefault(_unknown_part(place, modules), []).append(key)
    if absent:
        raise ValueError(
            "\n".join(
                f"{file}: {shorten(tensors)} are of a module that the base lacks: trained on another base, "
                f"or a task's head; exclude it with ignore=['{part}.*']"
                for part, tensors in absent.items()
            )
        )


def _unknown_part(place: str, modules: set[str]) -> str:
    """The shortest prefix of `place` that is not a module."""
    words = place.split(".")
    return next(head for i in range(len(words)) if (head := ".".join(words[: i + 1])) not in modules)
