"""Read a recipe and its text length from a run folder, an export or a configuration."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from trainmerge.checkpoints.whole import MANIFEST, RECIPE
from trainmerge.data.columns import Columns
from trainmerge.run.config import read_config, read_yaml
from trainmerge.run.folder import RunFolder
from trainmerge.run.hub_origins import pinned, recorded_origins
from trainmerge.run.manifest import read_manifest
from trainmerge.run.recipe import Recipe
from trainmerge.system.json_file import read_json

DEFAULT_LENGTH = 256  # as in Calibration
NONE_OF_THESE = "not a run folder, exported checkpoint or configuration file"
COLUMNS = {field.name for field in fields(Columns)}


def recipe_of(path: Path) -> Recipe:
    """The recipe of a run folder, an exported checkpoint, or a configuration file; a run's at its commits.

    Raises:
        ValueError: it is none of these.
    """
    for file in (path / "recipe.yaml", path / RECIPE, path):
        if file.is_file():
            recipe, manifest = read_config(Recipe, "recipe", file), RunFolder(path).manifest
            return (
                pinned(recipe, recorded_origins(read_manifest(manifest), manifest))
                if manifest.is_file()
                else recipe
            )
    raise ValueError(f"{path}: {NONE_OF_THESE}")


def tasks_of(path: Path) -> Recipe:
    """The same, for its tasks.

    Raises:
        ValueError: as `recipe_of`; an export whose test files are elsewhere: it names them without folders.
    """
    recipe = recipe_of(path)
    tests = [expert.test for expert in recipe.experts.values()]
    tests += [task.test for task in recipe.held_out.values()]
    missing = [file for file in tests if file and not Path(file).exists()]
    if missing and (path / RECIPE).is_file():
        raise ValueError(
            f"{path} names its tasks' files without their folders ({missing[0]} is not in {Path.cwd()}). "
            "Name the run or the configuration that has them: --recipe RUN"
        )
    return recipe


def text_length(path: Path, given: int | None = None) -> int:
    """Tokens to which texts are truncated: `given`, or by default as in the fit of `path`.

    `path` is a run folder, an exported checkpoint or a configuration; 256 if it gives no length.
    """
    return given if given is not None else int(_data_of(path).get("max_length", DEFAULT_LENGTH))


def columns_of(path: Path) -> Columns:
    """The columns of calibration and test files, of a run folder, an exported checkpoint or a configuration.

    Raises:
        ValueError: they are not a mapping of column names.
    """
    given = _data_of(path).get("columns") or {}
    if not isinstance(given, Mapping) or given.keys() - COLUMNS:
        raise ValueError(f"{path}: data.columns is {given!r}; it is a mapping with keys of {sorted(COLUMNS)}")
    return Columns(**given)


def learns(path: Path) -> bool:
    """Whether the fit of a configuration, a run or an export has steps; True if it is unknown."""
    trainer = _section(path, "trainer")
    return trainer is None or trainer.get("max_steps") != 0


def initial_of(path: Path) -> Any:
    """`model.initial` of a configuration, a run or an export, as the file has it; None if it has none."""
    return (_section(path, "model") or {}).get("initial")


def _section(path: Path, name: str) -> Mapping[str, Any] | None:
    """A section of the configuration of `path`; None if it is unknown, or no mapping."""
    files = (path / "config.yaml", path / "trainmerge_config.yaml", path)
    content = next((read_yaml(file) for file in files if file.is_file()), None)
    section = content.get(name) if isinstance(content, Mapping) else None
    return section if isinstance(section, Mapping) else None


def _data_of(path: Path) -> Mapping[str, Any]:
    """The settings of the calibration data, as the file has them; empty if `path` has none."""
    if RunFolder(path).manifest.is_file():
        content = RunFolder(path).read_manifest()
    elif (manifest := path / MANIFEST).is_file():
        content = read_json(manifest, "Export the run again.").get("run") or {}
    else:
        content = read_yaml(path) if path.is_file() else {}
    if not isinstance(content or {}, Mapping):
        raise ValueError(f"{path}: {NONE_OF_THESE}")
    found = (content or {}).get("data") or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: its section `data` is {found!r}, not a mapping")
    return found
