"""Open a run folder: read its recipe, coefficients and manifest, and check that they agree."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from trainmerge.checkpoints import same_weights
from trainmerge.coefficients.coefficients import Coefficients, load_coefficients
from trainmerge.preprocess import Trim
from trainmerge.run.config import read_config, to_config
from trainmerge.run.folder import RunFolder
from trainmerge.run.hub_origins import pinned, recorded_origins
from trainmerge.run.manifest import differences
from trainmerge.run.opened import Opened
from trainmerge.run.recipe import Recipe
from trainmerge.run.saved import check_coefficients
from trainmerge.run.trust import check_classes

MERGED = (  # recipe keys that an export depends on
    "preprocess", "grouping", "ignore", "vocabulary", "tokenizer", "chat_template", "generation_config",
    "pad_to_multiple", "tokens", "align", "buffers",
)  # fmt: skip


def open_run(folder: RunFolder) -> tuple[Recipe, Coefficients, Opened]:
    """A run's recipe, coefficients and files.

    Raises:
        ValueError: see `read_run`; or base or experts changed since the fit.
    """
    recipe, coefficients, manifest = read_run(folder)
    fitted = manifest["checksums"]
    opened = recipe.reopen(folder.sources, fitted) or recipe.open(folder.workspace)
    opened.share_checksums()
    changed = [
        name for name, files in opened.checksums.items() if not same_weights(fitted.get(name, {}), files)
    ]
    if changed:
        raise ValueError(
            f"{folder.path}: the weights of {changed} changed since the fit; restore them, or fit again"
        )
    # What was made for the fit is found again, even if a tokenizer was corrected since.
    return recipe, coefficients, replace(opened, known_checksums=fitted)


def read_run(folder: RunFolder) -> tuple[Recipe, Coefficients, dict[str, Any]]:
    """A run's recipe, coefficients and manifest; base and experts are not checked.

    Ids of the hub are at the commits of the fit. Densities that a search found are those of a last `Trim`.

    Raises:
        ValueError: no run, no coefficients, a damaged file, or files of different runs.
    """
    if of_modules(folder):
        raise ValueError(
            f"{folder.path}: a run of tm.fit_module, whose base and experts are modules of another program: "
            "`trainmerge report` reads it; save the module that fit_module returns"
        )
    if not folder.recipe.exists():
        raise ValueError(f"{folder.path}: not a run folder (no recipe.yaml); `trainmerge fit` creates one")
    if not folder.coefficients.exists():
        raise ValueError(f"{folder.path}: no coefficients yet; run `trainmerge fit` again to resume")
    manifest = folder.read_manifest()
    check_classes(manifest, folder.manifest)
    recipe = read_config(Recipe, "recipe", folder.recipe)
    coefficients = load_coefficients(folder.coefficients)
    if problems := list(_mismatches(recipe, coefficients, manifest)):
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ValueError(
            f"{folder.path}: its files are not of one run:\n{lines}\nRestore the files that the fit wrote, "
            "or fit again in another folder."
        )
    check_coefficients(folder, manifest)
    if coefficients.densities:
        recipe = replace(recipe, preprocess=(*recipe.preprocess, Trim(coefficients.densities)))
    return pinned(recipe, recorded_origins(manifest, folder.manifest)), coefficients, manifest


def of_modules(folder: RunFolder) -> bool:
    """Whether a folder holds a run of `fit_module`, which has no recipe."""
    return folder.manifest.exists() and "module" in folder.read_manifest()


def read_module_run(folder: RunFolder) -> tuple[Coefficients, dict[str, Any]]:
    """The coefficients and manifest of a run of `fit_module`.

    Raises:
        ValueError: no coefficients, or not those of this run; a damaged file.
    """
    if not folder.coefficients.exists():
        raise ValueError(f"{folder.path}: no coefficients yet; call fit_module again to resume")
    manifest = folder.read_manifest()
    check_coefficients(folder, manifest)
    return load_coefficients(folder.coefficients), manifest


def _mismatches(recipe: Recipe, coefficients: Coefficients, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Differences of recipe and coefficients from the manifest. Paths may differ; contents are hashed."""
    orders = {"recipe.yaml": list(recipe.experts), "coefficients.safetensors": list(coefficients.experts)}
    for file, experts in orders.items():
        if experts != manifest["experts"]:
            yield f"{file} has the experts {experts}, manifest.json has {manifest['experts']}"
    layout = coefficients.layout.identity()
    if manifest.get("layout", layout) != layout:
        yield "coefficients.safetensors has a different layout than manifest.json"
    made, now = manifest["recipe"], to_config(recipe)
    known = {key: _common(now[key], made[key]) for key in MERGED if key in made}
    if different := differences({key: _common(made[key], now[key]) for key in known}, known):
        yield f"recipe.yaml differs from manifest.json:\n{different}"


def _common(own: Any, other: Any) -> Any:
    """`own` without the keys that `other` lacks, and without the path of a chunk file, which may move.

    A later version may have more keys; the layout is compared as well.
    """
    if not isinstance(own, Mapping) or not isinstance(other, Mapping):
        return own
    both = {key: _common(value, other[key]) for key, value in own.items() if key in other}
    return {key: value for key, value in both.items() if not (key == "chunks" and isinstance(value, str))}
