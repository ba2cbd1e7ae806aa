"""Layers after the model, in subfolders (sentence-transformers' Dense). A merge has the base's."""

import warnings
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath

from trainmerge.system import json_file
from trainmerge.system.safetensors_file import sha256

MODULES = "modules.json"
WEIGHTS = (".safetensors", ".bin")


def module_folders(path: Path) -> set[Path]:
    """The subfolders, relative to `path`, that modules.json names. Raises ValueError if it is damaged."""
    if not (path / MODULES).is_file():
        return set()
    entries = json_file.read_value(path / MODULES, "Download or save it again.")
    entries = entries if isinstance(entries, list) else []
    named = [entry.get("path") for entry in entries if isinstance(entry, Mapping)]
    places = [PureWindowsPath(name) for name in named if isinstance(name, str) and name.strip("./")]
    inside = [place for place in places if not (place.drive or place.root or ".." in place.parts)]
    return {Path(*place.parts) for place in inside if (path / Path(*place.parts)).is_dir()}


def warn_of_side_modules(base: Path, expert: Path) -> None:
    """Warn of layers after the model whose weights differ from the base's, or that only one side has."""
    folders = module_folders(base) | module_folders(expert)
    files = {
        file.relative_to(side)
        for side in (base, expert)
        for folder in folders
        for file in (side / folder).glob("*")
        if file.suffix in WEIGHTS
    }
    different = [str(file) for file in sorted(files) if _digest(base / file) != _digest(expert / file)]
    if different:
        warnings.warn(
            f"{expert}: {', '.join(different)} differs from the base's: layers after the model are not "
            "merged, and the export has the base's. Copy the expert's into the export if they are meant",
            stacklevel=2,
        )


def _digest(file: Path) -> str | None:
    return sha256(file) if file.is_file() else None
