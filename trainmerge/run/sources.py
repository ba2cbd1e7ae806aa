"""Read a recipe and its text length from a run folder, an export or a configuration."""

from pathlib import Path

from trainmerge.checkpoints.whole import MANIFEST, RECIPE
from trainmerge.run.config import read_config, read_yaml
from trainmerge.run.folder import RunFolder
from trainmerge.run.recipe import Recipe
from trainmerge.system.json_file import read_json

DEFAULT_LENGTH = 256  # as in Calibration


def recipe_of(path: Path) -> Recipe:
    """The recipe of a run folder, an exported checkpoint, or a configuration file.

    Raises:
        ValueError: it is none of these.
    """
    for file in (path / "recipe.yaml", path / RECIPE, path):
        if file.is_file():
            return read_config(Recipe, "recipe", file)
    raise ValueError(f"{path}: not a run folder, exported checkpoint or configuration file")


def text_length(path: Path, given: int | None = None) -> int:
    """Tokens to which texts are truncated: `given`, or by default as in the fit of `path`.

    `path` is a run folder, an exported checkpoint or a configuration; 256 if it gives no length.
    """
    if given is not None:
        return given
    if RunFolder(path).manifest.is_file():
        return int(RunFolder(path).read_manifest()["data"]["max_length"])
    if (manifest := path / MANIFEST).is_file():
        return int(read_json(manifest, "Export the run again.")["run"]["data"]["max_length"])
    content = read_yaml(path) if path.is_file() else {}
    return int((content.get("data") or {}).get("max_length", DEFAULT_LENGTH))
