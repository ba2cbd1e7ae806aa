"""Coefficients and task vectors -> an ordinary checkpoint folder, a tensor at a time.

The base's own files set names, order, dtypes and shards. Nothing appears under the output's name before
all of it is written.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from trainmerge import processes
from trainmerge.card import model_card
from trainmerge.checkpoints import Checkpoint
from trainmerge.coefficients import Coefficients, load_coefficients, save_coefficients
from trainmerge.config import read_config, write_config
from trainmerge.folders import check_free_space
from trainmerge.preprocess import apply
from trainmerge.recipe import Opened, Recipe
from trainmerge.run_folder import RunFolder, versions
from trainmerge.storage import sha256, write_safetensors
from trainmerge.task_vectors import TaskVectors
from trainmerge.together import agreed, dealt, joined, staging_together

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"}
MANIFEST = "trainmerge_manifest.json"


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
    with staging_together(out, overwrite) as folder:
        write_checkpoint(base, task_vectors, coefficients, folder)


def write_checkpoint(
    base: Checkpoint, task_vectors: TaskVectors, coefficients: Coefficients, folder: Path
) -> None:
    """Write weights and side files into an empty folder; several processes deal the weight files out."""
    with agreed():
        check_free_space(folder, sum(file.stat().st_size for file in base.files))
        for file in dealt({file: file.stat().st_size for file in base.files}):
            names = base.shards[file]
            specs = {name: (base.tensors[name].dtype, tuple(base.tensors[name].shape)) for name in names}
            write_safetensors(
                folder / _target(file),
                specs,
                _merged(base, task_vectors, coefficients, names),
                {"format": "pt"},
            )
        base.check_unchanged()
    if processes.rank() > 0:
        return
    _copy_side_files(base.path, folder)
    if len(base.shards) > 1:
        homes = {name: _target(file) for file, names in base.shards.items() for name in names}
        size = sum((folder / target).stat().st_size for target in set(homes.values()))
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(homes.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _target(file: Path) -> str:
    """The name of the base's weight file in the export."""
    return Path(file.name.replace("pytorch_model", "model")).with_suffix(".safetensors").name


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
    """Config, tokenizer, remote code, in folders too: all but weights, their index, and the base's card."""
    for path in sorted(source.rglob("*")):
        place = path.relative_to(source)
        hidden = any(part.startswith(".") for part in place.parts)
        weights = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and not hidden and not weights and str(place) != "README.md":
            (target / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / place)


def check_target(out: Path, sources: Iterable[Path]) -> None:
    """Raise ValueError if `out` is, or holds, something that the merge is made from, or no export of ours."""
    place = out.resolve()
    inside = [str(source) for source in sources if source.resolve().is_relative_to(place)]
    if inside:
        raise ValueError(f"{out} holds {inside}, which the merge is made from; export to another folder")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).exists():
        raise ValueError(f"{out} is a folder that no export wrote: nothing was overwritten. Name another.")


def export_run(
    run: str | Path, out: str | Path, overwrite: bool = False, coefficients: Coefficients | None = None
) -> Path:
    """Export a run folder's merge, with a model card and everything needed to make it again.

    `coefficients` replace the run's own: those of a point on its Pareto front, say. Under torchrun, processes
    write the base's weight files in parallel: each its own, mapped, never gathered.

    Raises:
        ValueError: the run has no coefficients yet, or base or experts changed since the fit.
    """
    run_folder, target = RunFolder(Path(run)), Path(out)
    with joined():
        recipe, learned, opened = open_run(run_folder)
        coefficients = coefficients or learned
        check_target(target, [run_folder.path, *opened.folders.values()])
        with processes.first_alone():
            task_vectors = apply(
                opened.task_vectors,
                recipe.preprocess,
                run_folder.workspace,
                opened.identity(),
                run_folder.examples(),
            )
        with staging_together(target, overwrite) as folder:
            write_checkpoint(opened.base, task_vectors, coefficients, folder)
            if processes.rank() == 0:
                _explain(folder, target.name, run_folder, recipe, coefficients)
    return target


def _explain(
    folder: Path, name: str, run_folder: RunFolder, recipe: Recipe, coefficients: Coefficients
) -> None:
    """Everything but the weights that an export says of itself; the manifest last."""
    write_config(recipe, "recipe", folder / "trainmerge_recipe.yaml")
    save_coefficients(coefficients, folder / "trainmerge_coefficients.safetensors")
    run_made = json.loads(run_folder.manifest.read_text())
    if run_folder.config.exists():
        shutil.copyfile(run_folder.config, folder / "trainmerge_config.yaml")
    (folder / "README.md").write_text(model_card(name, recipe, coefficients, run_made))
    files = {
        str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    manifest = {"versions": versions(), "files": files, "run": run_made}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))


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
    opened.share_checksums()
    fitted = json.loads(folder.manifest.read_text())["checksums"]
    changed = [name for name, files in opened.checksums.items() if fitted.get(name) != files]
    if changed:
        raise ValueError(
            f"{folder.path}: the weights of {changed} changed since the fit; fit again with them"
        )
    return recipe, load_coefficients(folder.coefficients), opened
