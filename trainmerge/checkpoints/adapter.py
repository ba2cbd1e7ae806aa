"""A peft adapter folder on disk: its config and its tensors, under the base's module names."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor

from trainmerge.checkpoints.adapter_config import check_adapter_config
from trainmerge.checkpoints.adapter_head import is_own_key
from trainmerge.checkpoints.adapter_names import ROOT, WHOLE, Place, base_names, place_of, with_modern_names
from trainmerge.checkpoints.meta_model import quiet, shorten
from trainmerge.checkpoints.parameters import MERGED_DTYPES, Parameters
from trainmerge.checkpoints.tensor_file import PickleFile, WeightFile
from trainmerge.checkpoints.weight_files import find_weights, read_folder_json
from trainmerge.checkpoints.whole import PATCH, check_whole
from trainmerge.system.safetensors_file import MappedFile, TensorInfo
from trainmerge.system.text import reason, shortened
from trainmerge.task_vectors.parameter_names import matches
from trainmerge.task_vectors.places import is_place


@dataclass(frozen=True)
class Adapter:
    """An adapter's headers. Keys are peft's names without `base_model.model.`, with the base's own prefix."""

    path: Path
    config: Mapping[str, Any]  # adapter_config.json
    keys: Mapping[str, str]  # key -> its name in the file
    source: WeightFile
    ignored: Mapping[str, str] = field(default_factory=dict)  # the same of `ignore`d tensors of the base
    whole: Set[str] = frozenset()  # keys of no module, VeRA's projections say: peft's names as they are
    own: Mapping[str, str] = field(default_factory=dict)  # the same of its own head, under its class's names

    @property
    def file(self) -> Path:
        """The file of its tensors."""
        return next(iter(self.source.tensors.values())).file

    def module_of(self, key: str) -> str:
        """The name of the module that a key belongs to."""
        return place_of(self.config["peft_type"])(key)

    def peft_name(self, key: str) -> str:
        """peft's name of a key."""
        return key if key in self.whole else ROOT + key

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


def open_adapter(
    base: Parameters, path: Path, ignore: Sequence[str], allow_pickle: bool, whole_head: bool = False
) -> Adapter:
    """Open an adapter folder, headers only; `ignore`d tensors are left out.

    With `whole_head` its head is its own, whatever the base has.

    Raises FileNotFoundError or ValueError for a damaged folder, for fields and types unknown to the installed
    peft, for prompt tuning (it changes inputs, not weights), and for tensors of modules that the base lacks.
    """
    check_whole(path)
    if (path / PATCH).is_file():
        raise ValueError(
            f"{path}: an adapter with a file of further differences, {PATCH}, which a merge of the adapter "
            "would lack. Merge the model that it was made from; or remove that file to merge the rest"
        )
    config = read_folder_json(path / "adapter_config.json")
    check_adapter_config(path / "adapter_config.json", config)
    _check_config(path, config)
    files, _ = find_weights(path, "adapter_model.safetensors", "adapter_model.bin", allow_pickle)
    source: WeightFile = PickleFile(files[0]) if files[0].suffix == ".bin" else MappedFile(files[0])
    _check_dtypes(files[0], source)
    doubles = _doubles(source)
    names = [name for name in source.tensors if name.startswith(ROOT) and name not in doubles]
    whole = [name for name in source.tensors if name.startswith(WHOLE) and name not in (*names, *doubles)]
    if strange := [name for name in source.tensors if not name.startswith(WHOLE)]:
        raise ValueError(f"{files[0]}: {shorten(strange)} are outside {WHOLE!r}: not a supported adapter.")
    place = place_of(config["peft_type"])
    modules = {name for name, _ in base.meta_model.named_modules() if name}
    own = {name: name.removeprefix(ROOT) for name in names}
    fits, old = base_names(base, sorted({place(key) for key in own.values()}), modules)
    keys, ignored, head = {}, {}, {}
    for name, key in own.items():
        ours = fits[place(key)] + key.removeprefix(place(key))
        if not matches(ours, ignore) and not matches(key, ignore):
            if is_own_key(base, config, key, ours, source.tensors[name].shape, whole_head):
                head[key] = name
            else:
                keys[ours] = name
        elif fits[place(key)] in modules:
            ignored[ours] = name
    _check_experts(files[0], base, list(keys), place)
    _check_modules(files[0], list(keys), place, modules)
    if old:
        adapted = {place(key) for key in keys if key not in base.names.values()}
        config = with_modern_names(config, sorted(adapted), str(path / "adapter_config.json"))
    keys |= {name: name for name in whole}
    return Adapter(path, config, keys, source, ignored, frozenset(whole), head)


def _check_dtypes(file: Path, source: WeightFile) -> None:
    """Raise ValueError for a file without tensors, or with weights that are no floats."""
    if not source.tensors:
        raise ValueError(f"{file}: no tensors in it: download or save the adapter again.")
    for name, info in source.tensors.items():
        weight = ".lora_" in name or name.endswith((".weight", ".bias"))
        if weight and info.dtype not in MERGED_DTYPES:
            raise ValueError(
                f"{file}: {name} is {info.dtype}: quantised weights cannot be merged. Save the adapter as "
                "floats, as it was trained"
            )


def _doubles(source: WeightFile) -> set[str]:
    """Further copies of an embedding that is a module to save, of a resized vocabulary: peft reads neither.

    They are `X.original_module.weight`, and `X.modules_to_save.weight`, which equals `X.weight`.
    """
    found = set()
    for name in source.tensors:
        for end in (".original_module.weight", ".modules_to_save.weight"):
            module = name.removesuffix(end)
            plain, copy = f"{module}.weight", f"{module}.modules_to_save.weight"
            if name.endswith(end) and plain in source.tensors and copy in source.tensors:
                found |= {name} if torch.equal(source.read(copy), source.read(plain)) else set()
    return found


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    file, peft_type = path / "adapter_config.json", config.get("peft_type")
    if peft_type is None:
        raise ValueError(f"{file}: it has no peft_type, LORA say: save the adapter again, or add the key.")
    if peft_type not in list(PEFT_TYPE_TO_CONFIG_MAPPING):
        raise ValueError(f"{file}: peft_type {peft_type!r} is unknown to the installed peft; upgrade peft.")
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]
    known = {field.name for field in fields(kind)}
    # An unknown field that is off changes nothing.
    unknown = sorted(name for name, value in config.items() if name not in known and value)
    if unknown:
        raise ValueError(
            f"{file}: fields {shortened(', '.join(unknown), 600)} are unknown to the installed "
            "peft, which may misread the adapter; upgrade peft."
        )
    try:
        with quiet():
            parsed = kind(**{name: value for name, value in config.items() if name in known})
    except Exception as error:  # of many types, for a file that is a stranger's
        raise ValueError(f"{file}: peft rejects it: {reason(error)}") from error
    if parsed.is_prompt_learning or parsed.is_adaption_prompt:
        raise ValueError(f"{file}: {peft_type} changes inputs, not weights; it cannot be merged.")


def _check_experts(file: Path, base: Parameters, keys: Sequence[str], place: Place) -> None:
    """Raise ValueError if it adapts single experts of a mixture, which peft finds in stacks only."""
    if single := [key for key in keys if is_place(base.names.get(f"{place(key)}.weight", ""))]:
        raise ValueError(
            f"{file}: {shorten(single)} adapt single experts, which transformers now holds in one stack per "
            "layer: merge the adapter with the versions of transformers and peft that it was trained with, "
            "and give the merged model"
        )


def _check_modules(file: Path, keys: Sequence[str], place: Place, modules: set[str]) -> None:
    absent: dict[str, list[str]] = {}
    for key in keys:
        if place(key) not in modules:
            absent.setdefault(_unknown_part(place(key), modules), []).append(key)
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
