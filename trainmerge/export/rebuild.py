"""A merge again from its model card or its export: base, experts and coefficients -> the same files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainmerge.checkpoints import same_weights
from trainmerge.checkpoints.whole import COEFFICIENTS, RECIPE
from trainmerge.coefficients.coefficients import save_coefficients
from trainmerge.export.adapter_form import adapter_record
from trainmerge.export.explain import write_export_manifest
from trainmerge.export.export import check_target, write_checkpoint
from trainmerge.export.export_adapter import AdapterMerge
from trainmerge.export.published import Published, read_published
from trainmerge.export.shards import CheckpointMerge
from trainmerge.preprocess import Informed, apply_for_one_pass
from trainmerge.run.merge_buffers import REESTIMATE, averaged
from trainmerge.run.opened import Opened
from trainmerge.system.access import is_folder
from trainmerge.system.atomic import seen_from, temporary_folder
from trainmerge.system.hub import is_hub_id
from trainmerge.system.ranges import check_option
from trainmerge.system.staging import staging
from trainmerge.system.text import listed


def rebuild(source: str | Path, out: str | Path, overwrite: bool = False, workers: int = 1) -> Path:
    """Merge again what an export's folder or its README.md alone describes, and compare the weight files.

    Ids are taken from the hub's cache, or downloaded; folders without an id are looked for by their names in
    the working directory. Nothing is written unless every weight file has the SHA-256 that was published.

    Args:
        source: The folder of an export, or its model card.
        out: The folder to create.
        overwrite: Replace it if it exists.
        workers: Shards to write in parallel; their number changes no byte.

    Raises:
        FileExistsError: `out` exists and `overwrite` is not set.
        FileNotFoundError: a base or expert is missing.
        ValueError: no such card or export, a method that reads calibration examples, models with other
            weights, or files that differ.
    """
    check_option("workers", workers, int, "[1, inf)")
    target = Path(out)
    whole = target.resolve()
    # preprocessed task vectors may be large: beside the target
    with temporary_folder(whole.parent, f"{whole.name}.rebuild") as place:
        made = read_published(Path(source), place)
        check_possible(made, str(source))
        opened = made.recipe.open(place)
        check_sources(made, opened, str(source))
        check_target(target, [Path(source), *opened.folders.values()])
        task_vectors, rule = apply_for_one_pass(
            opened.task_vectors, made.recipe.preprocess, place, opened.identity()
        )
        buffers = averaged(made.recipe, opened.base, opened)
        merge = CheckpointMerge(opened.base, task_vectors, made.coefficients, rule, made.form, buffers)
        more: dict[str, Any] = {"form": made.form.to_json()} if made.form.to_json() else {}
        with staging(target, overwrite) as folder:
            if made.adapter is None:
                check_same_digests(write_checkpoint(merge, folder, workers), made.files, str(source))
            else:
                reports, files = AdapterMerge(merge, opened, made.recipe, made.adapter).write(folder)
                check_same_digests(files, made.files, str(source))
                more |= adapter_record(made.adapter, reports)
            (folder / RECIPE).write_text(made.recipe_text, encoding="utf-8")
            (folder / "README.md").write_text(made.card, encoding="utf-8")
            save_coefficients(made.coefficients, folder / COEFFICIENTS)
            write_export_manifest(folder, made.files, made.run, {"rebuilt": True} | more)
    return target


def check_possible(made: Published, source: str) -> None:
    """Raise for methods that read calibration examples, and for models that are neither here nor on a hub."""
    informed = [type(method).__name__ for method in made.recipe.preprocess if isinstance(method, Informed)]
    if informed:
        raise ValueError(
            f"{source}: {', '.join(informed)} reads calibration examples, which a card does not hold, so the "
            "merge cannot be rebuilt. Export it from its run folder"
        )
    if made.recipe.buffers == REESTIMATE:
        raise ValueError(
            f"{source}: its batch norms' statistics were measured on calibration examples, which a card does "
            "not hold, so the merge cannot be rebuilt. Export it from its run folder"
        )
    if made.task:
        raise ValueError(
            f"{source}: it has the class and head of the expert {made.task} (export --task), which a rebuild "
            "does not make. Export it from its run folder"
        )
    if list(made.coefficients.experts) != list(made.recipe.experts):
        raise ValueError(f"{source}: its recipe and its coefficients name other experts: one is damaged")
    missing = [
        f"{name} ({path})"
        for name, path in made.recipe.paths.items()
        if not is_hub_id(path) and not is_folder(Path(path))
    ]
    if missing:
        raise FileNotFoundError(
            f"{source} names {', '.join(missing)} without an id of the hub, and there is no such "
            f"folder{seen_from('x')}. Put the folders there, or links to them"
        )


def check_sources(made: Published, opened: Opened, source: str) -> None:
    """Raise ValueError for base or experts with other weights than the merge's, or without its tensors."""
    changed = [
        name
        for name, files in opened.checksums.items()
        if name in made.sources and not same_weights(made.sources[name], files)
    ]
    if changed:
        raise ValueError(
            f"{source}: the weights of {', '.join(changed)} are not those of the merge: another version of "
            "the model. Use the commit or the folder that the merge was made from"
        )
    if unknown := sorted(made.coefficients.layout.groups.keys() - opened.task_vectors.deltas.keys()):
        raise ValueError(
            f"{source}: its coefficients are for {listed(unknown)}, which the models do not have"
        )


def check_same_digests(made: Mapping[str, str], published: Mapping[str, str], source: str) -> None:
    """Raise ValueError that names every weight file that differs."""
    names = sorted(made.keys() | published.keys())
    if different := [name for name in names if made.get(name) != published.get(name)]:
        raise ValueError(
            f"the merge is not the one of {source}: {listed(different)} has another SHA-256. Another "
            "processor, version of torch or number of threads may round differently; "
            "trainmerge_manifest.json has those of the export"
        )
