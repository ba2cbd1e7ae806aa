"""Read a recipe and its text length from a run folder, an export or a configuration."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from trainmerge.checkpoints.whole import MANIFEST, RECIPE
from trainmerge.data.examples import Columns
from trainmerge.run.config import read_config, read_yaml
from trainmerge.run.folder import RunFolder
from trainmerge.run.recipe import Recipe
from trainmerge.system.json_file import read_json

DEFAULT_LENGTH = 256  # as in Calibration
COLUMNS = {field.name for field in fields(Columns)}


def recipe_of(path: Path) -> Recipe:
    """The recipe of a run folder, an exported checkpoint, or a configuration file.

    Raises:
        ValueError: it is none of these, or an export whose test files cannot be found.
    """
    for file in (path / "recipe.yaml", path / RECIPE, path):
        if file.is_file():
            recipe = read_config(Recipe, "recipe", file)
            if file == path / RECIPE:
                _check_tasks(path, recipe)
            return recipe
    raise ValueError(f"{path}: not a run folder, exported checkpoint or configuration file")


def _check_tasks(path: Path, recipe: Recipe) -> None:
    """An export names its test files without their folders; they exist only where it was made so."""
    tests = [task.test for task in (*recipe.experts.values(), *recipe.held_out.values()) if task.test]
    if missing := [file for file in tests if not Path(file).exists()]:
        raise ValueError(
            f"{path} names its tasks' files without their folders ({missing[0]} is not in {Path.cwd()}). "
            "Name the run or the configuration that has them: --recipe RUN"
        )


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


def _data_of(path: Path) -> Mapping[str, Any]:
    """The settings of the calibration data, as the file has them; empty if `path` has none."""
    if RunFolder(path).manifest.is_file():
        content = RunFolder(path).read_manifest()
    elif (manifest := path / MANIFEST).is_file():
        content = read_json(manifest, "Export the run again.").get("run") or {}
    else:
        content = read_yaml(path) if path.is_file() else {}
    found = (content or {}).get("data") or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: its section `data` is {found!r}, not a mapping")
    return found
