"""Coefficients and task vectors -> an ordinary checkpoint folder, a tensor at a time.

The base's own files set names, order, dtypes and shards. Nothing appears under the output's name before
all of it is written.
"""

import json
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from trainmerge.card import model_card
from trainmerge.checkpoints import Checkpoint
from trainmerge.coefficients import Coefficients, load_coefficients, save_coefficients
from trainmerge.config import read_config, write_config
from trainmerge.folders import check_free_space, staging
from trainmerge.preprocess import apply
from trainmerge.recipe import Opened, Recipe
from trainmerge.run_folder import RunFolder, versions
from trainmerge.storage import sha256, write_safetensors
from trainmerge.task_vectors import TaskVectors

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"}


def export_merge(
    base: Checkpoint,
    task_vectors: TaskVectors,
    coefficients: Coefficients,
    out: Path,
    overwrite: bool = False,
) -> None:
    """Write the merge as a checkpoint folder like the base's, with its configuration and tokenizer.

    Merged tensors are rounded once, to the base's dtype; all others are the base's, bit for bit.

    Raises:
        FileExistsError: `out` exists and `overwrite` is not set.
        OSError: the disk has no room for it.
        ValueError: a merged tensor is not finite.
    """
    with staging(out, overwrite) as folder:
        write_checkpoint(base, task_vectors, coefficients, folder)


def write_checkpoint(
    base: Checkpoint, task_vectors: TaskVectors, coefficients: Coefficients, folder: Path
) -> None:
    """Write weights and side files into an empty folder."""
    check_free_space(folder, sum(file.stat().st_size for file in base.files))
    for file, names in base.shards.items():
        specs = {name: (base.tensors[name].dtype, tuple(base.tensors[name].shape)) for name in names}
        target = folder / Path(file).with_suffix(".safetensors").name
        write_safetensors(target, specs, _merged(base, task_vectors, coefficients, names), {"format": "pt"})
    _copy_side_files(base.path, folder)


@torch.no_grad()
def _merged(
    base: Checkpoint, task_vectors: TaskVectors, coefficients: Coefficients, names: Iterable[str]
) -> Iterator[tuple[str, Tensor]]:
    values = coefficients()
    for name in names:
        canonical = base.tied.get(name, name)
        if canonical not in coefficients.layout.groups:
            yield name, base.read(name)
            continue
        merged = torch.empty_like(base.read(name))
        task_vectors.deltas[canonical].merge(merged, coefficients.of(canonical, values))
        if not bool(torch.isfinite(torch.stack(torch.aminmax(merged))).all()):
            raise ValueError(
                f"{name}: the merged tensor is not finite; look at its coefficients with `trainmerge inspect`"
            )
        yield name, merged


def _copy_side_files(source: Path, target: Path) -> None:
    """Config, tokenizer, remote code: everything that is neither weights nor the base's own card."""
    for path in sorted(source.iterdir()):
        if (
            path.is_file()
            and path.suffix not in WEIGHT_SUFFIXES
            and path.name not in ("README.md", ".gitattributes")
        ):
            shutil.copyfile(path, target / path.name)


def export_run(run: str | Path, out: str | Path, overwrite: bool = False) -> Path:
    """Export a run folder's merge, with a model card and everything needed to make it again.

    Raises:
        ValueError: the run has no coefficients yet, or base or experts changed since the fit.
    """
    run_folder, target = RunFolder(Path(run)), Path(out)
    recipe, coefficients, opened = open_run(run_folder)
    task_vectors = apply(opened.task_vectors, recipe.preprocess, run_folder.workspace, opened.identity())
    with staging(target, overwrite) as folder:
        write_checkpoint(opened.base, task_vectors, coefficients, folder)
        write_config(recipe, "recipe", folder / "trainmerge_recipe.yaml")
        save_coefficients(coefficients, folder / "trainmerge_coefficients.safetensors")
        command = shlex.join(["trainmerge", *sys.argv[1:]])
        (folder / "README.md").write_text(model_card(target.name, recipe, coefficients, command))
        manifest = {
            "versions": versions(),
            "sources": opened.checksums,
            "files": {path.name: sha256(path) for path in sorted(folder.iterdir())},
        }
        (folder / "trainmerge_manifest.json").write_text(json.dumps(manifest, indent=2))
    return target


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
    opened = recipe.open(folder.workspace)
    fitted = json.loads(folder.manifest.read_text())["checksums"]
    changed = [name for name, files in opened.checksums.items() if fitted.get(name) != files]
    if changed:
        raise ValueError(
            f"{folder.path}: the weights of {changed} changed since the fit; fit again with them"
        )
    return recipe, load_coefficients(folder.coefficients), opened
