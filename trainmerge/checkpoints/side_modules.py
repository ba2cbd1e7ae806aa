"""Modules after the model, which `modules.json` of sentence-transformers lists; from its files alone.

The weights of `Dense` and `LayerNorm` modules are parameters of the merge, named by their folder:
`2_Dense.linear.weight`. Those of other modules are the base's.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from trainmerge.checkpoints.tensor_file import PickleFile, WeightFile
from trainmerge.system import json_file
from trainmerge.system.access import is_folder
from trainmerge.system.links import check_link
from trainmerge.system.safetensors_file import MappedFile, TensorInfo, sha256

MODULES = "modules.json"
WEIGHTS = (".safetensors", ".bin")
REMEDY = "Download or save it again."
LAYERS = {"Dense": "linear", "LayerNorm": "norm"}  # kinds whose weights are merged -> their layer's name
FILES = ("model.safetensors", "pytorch_model.bin")  # of a module, in the order in which they are looked for


class SideModule(NamedTuple):
    """One entry of modules.json."""

    kind: str  # the class's name, without its Python module; empty if the entry names none
    place: str  # its folder relative to the checkpoint's, with slashes; empty for the checkpoint's own


class SideTensor(NamedTuple):
    """A weight of a module after the model."""

    source: WeightFile
    name: str  # in that file

    @property
    def info(self) -> TensorInfo:
        """Its header."""
        return self.source.tensors[self.name]


def read_modules(path: Path) -> list[SideModule]:
    """The modules that modules.json lists, in order; none without that file.

    Raises:
        ValueError: the file is damaged.
    """
    if not (path / MODULES).is_file():
        return []
    check_link(path, path / MODULES)
    entries = json_file.read_value(path / MODULES, REMEDY)
    entries = entries if isinstance(entries, list) else []
    return [
        SideModule(str(entry.get("type", "")).rpartition(".")[2], _place(entry.get("path")))
        for entry in entries
        if isinstance(entry, Mapping)
    ]


def _place(named: Any) -> str:
    parts = PureWindowsPath(named).parts if isinstance(named, str) else ()
    return "/".join(part for part in parts if part != ".")


def module_folders(path: Path) -> set[Path]:
    """The subfolders, relative to `path`, that modules.json names. Raises ValueError if it is damaged."""
    places = [PureWindowsPath(module.place) for module in read_modules(path) if module.place]
    inside = [place for place in places if not (place.drive or place.root or ".." in place.parts)]
    return {Path(*place.parts) for place in inside if is_folder(path / Path(*place.parts))}


def side_weights(path: Path, allow_pickle: bool = False) -> dict[str, SideTensor]:
    """The weights of the modules after the model that are merged, in order, under their parameters' names.

    Raises:
        ValueError: modules.json or a weight file is damaged, or a module has other weights than its kind.
    """
    folders = module_folders(path)
    found: dict[str, SideTensor] = {}
    for kind, place in read_modules(path):
        file = _weight_file(path / place, allow_pickle) if Path(place) in folders else None
        if kind not in LAYERS or file is None:
            continue
        check_link(path, file)
        source: WeightFile = PickleFile(file) if file.suffix == ".bin" else MappedFile(file)
        weight, bias = f"{LAYERS[kind]}.weight", f"{LAYERS[kind]}.bias"
        if not {weight} <= source.tensors.keys() <= {weight, bias}:
            raise ValueError(
                f"{file}: has {sorted(source.tensors)}, a {kind} module has {weight}, and {bias} if it "
                "has a bias. Save it again."
            )
        found |= {f"{place}.{name}": SideTensor(source, name) for name in source.tensors}
    return found


def _weight_file(folder: Path, allow_pickle: bool) -> Path | None:
    names = FILES if allow_pickle else FILES[:1]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def side_folder(name: str) -> str:
    """The folder of a parameter of a module after the model.

    >>> side_folder("2_Dense.linear.weight")
    '2_Dense'
    """
    return name.rsplit(".", 2)[0]


def layer_name(name: str) -> str:
    """The child of the model that has a parameter of a module after it: its folder, without dots."""
    return side_folder(name).replace(".", "_")


def warn_of_side_modules(base: Path, expert: Path, merged: set[Path]) -> None:
    """Warn of weights after the model that differ from the base's, or that only one side has.

    `merged` are the folders, relative to the checkpoint's, whose weights are merged.
    """
    files = {
        file.relative_to(side)
        for side in (base, expert)
        for folder in (module_folders(base) | module_folders(expert)) - merged
        for file in (side / folder).glob("*")
        if file.suffix in WEIGHTS
    }
    different = [str(file) for file in sorted(files) if digest_of(base / file) != digest_of(expert / file)]
    if different:
        warnings.warn(
            f"{expert}: {', '.join(different)} differs from the base's: these layers after the model are not "
            "merged, and the export has the base's. Copy the expert's into the export if they are meant",
            stacklevel=2,
        )


def digest_of(file: Path) -> str | None:
    """SHA-256 of a file; None if there is none."""
    return sha256(file) if file.is_file() else None
