"""A finished run: its recipe, its coefficients, its files."""

import json

from trainmerge.coefficients.coefficients import Coefficients, load_coefficients
from trainmerge.run.config import read_config
from trainmerge.run.folder import RunFolder
from trainmerge.run.recipe import Opened, Recipe


def open_run(folder: RunFolder) -> tuple[Recipe, Coefficients, Opened]:
    """A run's recipe, coefficients and files.

    Raises:
        ValueError: no run, no coefficients, or base or experts changed since the fit.
    """
    if not folder.recipe.exists():
        raise ValueError(f"{folder.path}: no run in it (no recipe.yaml); `trainmerge fit --run` makes one")
    if not folder.coefficients.exists():
        raise ValueError(f"{folder.path}: no coefficients yet; go on with `trainmerge fit --resume auto`")
    recipe = read_config(Recipe, "recipe", folder.recipe)
    fitted = json.loads(folder.manifest.read_text())["checksums"]
    opened = recipe.reopen(folder.sources, fitted) or recipe.open(folder.workspace)
    opened.share_checksums()
    changed = [name for name, files in opened.checksums.items() if fitted.get(name) != files]
    if changed:
        raise ValueError(
            f"{folder.path}: the weights of {changed} changed since the fit; fit again with them"
        )
    return recipe, load_coefficients(folder.coefficients), opened
