"""Coefficients and task vectors -> an ordinary checkpoint folder, one piece of a tensor at a time.

Names, order, dtypes and shards are those of the base's files. The output folder appears only when it is
complete.
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from trainmerge.checkpoints import Checkpoint
from trainmerge.checkpoints.whole import MANIFEST
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.export.explain import Exported, explain
from trainmerge.export.form import DtypeName, Form, write_dtype
from trainmerge.export.shards import CheckpointMerge, write_shards
from trainmerge.export.side_files import copy_base_files
from trainmerge.export.task import TaskMerge, own_head, write_task
from trainmerge.export.tensors import Merged
from trainmerge.preprocess import apply_for_one_pass
from trainmerge.run.folder import RunFolder
from trainmerge.run.merge_buffers import merge_buffers
from trainmerge.run.open_run import open_run
from trainmerge.run.opened import Opened
from trainmerge.run.recipe import Recipe
from trainmerge.run.saved import unfinished, unfinished_line
from trainmerge.run.sources import columns_of
from trainmerge.system import distributed
from trainmerge.system.disk_space import check_free_space
from trainmerge.system.distributed import joined
from trainmerge.system.ranges import check_option
from trainmerge.system.shared_output import agreed, balanced_share, staging_shared
from trainmerge.task_vectors.delta import TaskVectors

INDEX = "model.safetensors.index.json"


def export_merge(
    base: Checkpoint,
    task_vectors: TaskVectors,
    coefficients: Coefficients,
    out: Path,
    overwrite: bool = False,
    workers: int = 1,
) -> None:
    """Write the merge as a checkpoint folder like the base's, with its configuration and tokenizer.

    Merged tensors are rounded once, to the base's dtype; all others are bitwise the base's. `workers` shards
    are written in parallel; their number changes no byte.

    Raises:
        FileExistsError: `out` exists and `overwrite` is not set.
        OSError: the disk has no room for it.
        ValueError: a merged tensor is not finite.
    """
    with staging_shared(out, overwrite) as folder:
        write_checkpoint(CheckpointMerge(base, task_vectors, coefficients), folder, workers)


def write_checkpoint(merge: Merged, folder: Path, workers: int = 1) -> dict[str, str]:
    """Write weights and side files into an empty folder; returns the weight files' SHA-256.

    Several processes split the weight files; the first one writes the rest.
    """
    base = merge.base
    with agreed():
        shards, after = merge.shards, merge.after
        size_of = {name: merge.form.size_of(info) for name, info in merge.tensors.items()}
        files = {**shards, **after}
        sizes = {file: sum(size_of[name] for name in names) for file, names in files.items()}
        check_free_space(folder, sum(sizes.values()))
        mine = write_shards(merge, folder, balanced_share(sizes), workers)
        base.check_unchanged()
    made = {file: digest for part in distributed.all_gather(mine) for file, digest in part.items()}
    if distributed.rank() > 0:
        return made
    copy_base_files(base, folder, {Path(file).parent for file in after})
    if merge.form.dtype:
        write_dtype(folder / "config.json", merge.form.dtype)
    if len(shards) > 1:
        size = sum((folder / file).stat().st_size for file in shards)
        homes = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(homes.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
    return made


def check_target(out: Path, sources: Iterable[Path]) -> None:
    """Raise ValueError if `out` contains an input of the merge, or exists and is not an export."""
    place = out.resolve()
    inside = [str(source) for source in sources if source.resolve().is_relative_to(place)]
    if inside:
        raise ValueError(f"{out} contains {inside}, an input of the merge; export to another folder")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).exists():
        raise ValueError(
            f"{out} exists and is not an export: nothing was overwritten. Choose another folder."
        )


def export_run(
    run: str | Path,
    out: str | Path,
    overwrite: bool = False,
    workers: int = 1,
    coefficients: Coefficients | None = None,
    dtype: DtypeName | None = None,
    shard_size: str | None = None,
    task: str | None = None,
) -> Path:
    """Export a run folder's merge, with a model card and everything needed to reproduce it.

    `workers` shards are written in parallel; their number changes no byte. `coefficients` replace the run's
    own, for example by those of a point on its Pareto front. With `task`, an expert's name, the checkpoint
    is of that expert's class, with its own head over the merged weights. Under torchrun, the processes split
    the weight files; no tensor is gathered. `dtype` and `shard_size` are those of `Form`; by default the
    base's.

    Raises:
        ValueError: the run has no coefficients yet, base or experts changed since the fit, or `task` has no
            head of its own.
    """
    check_option("workers", workers, int, "[1, inf)")
    run_folder, target, form = RunFolder(Path(run)), Path(out), Form(dtype, shard_size)
    if task and form.to_json():
        raise ValueError("an export with a task's head has the base's dtype and one file: leave out the form")
    with joined():
        exported = replace(begin_export(run_folder, target, coefficients), task=task or "", form=form)
        recipe, opened = exported.recipe, exported.opened
        head = own_head(recipe, opened, task) if task is not None else None
        with staging_shared(target, overwrite) as folder:
            with agreed(), distributed.rank_zero_first():
                merge = replace(merge_of(run_folder, recipe, exported.coefficients, opened), form=form)
            if head is None:
                made = write_checkpoint(merge, folder, workers)
            else:
                with agreed():
                    made = write_task(TaskMerge.of(merge, head), folder) if distributed.rank() == 0 else {}
            if distributed.rank() == 0:
                encode_again(run_folder, recipe, opened, folder)
                explain(folder, target.name, exported, made)
    return target


def begin_export(run_folder: RunFolder, target: Path, coefficients: Coefficients | None) -> Exported:
    """Open a run for its export into `target`, and say if it is unfinished; for all processes.

    Raises:
        ValueError: as `open_run` and `check_target`.
    """
    recipe, learned, opened = open_run(run_folder)
    at = unfinished(run_folder)
    if at and distributed.rank() == 0:
        print(unfinished_line(run_folder), flush=True)
    check_target(target, [run_folder.path, *opened.folders.values()])
    return Exported(run_folder, recipe, opened, coefficients or learned, coefficients is None, at)


def encode_again(run_folder: RunFolder, recipe: Recipe, opened: Opened, folder: Path) -> None:
    """Raise ValueError unless the export's tokenizer gives the calibration chats the ids of the fit."""
    if columns_of(run_folder.path).messages is not None:
        from trainmerge.run.encoding import check_encoding  # imports transformers

        if count := check_encoding(run_folder, recipe, opened.base.path, folder):
            print(
                f"{count} calibration chats have the same token ids with the export's tokenizer", flush=True
            )


def merge_of(
    run_folder: RunFolder, recipe: Recipe, coefficients: Coefficients, opened: Opened
) -> CheckpointMerge:
    """The merge of an opened run; runs preprocessors whose results are not cached."""
    task_vectors, rule = apply_for_one_pass(
        opened.task_vectors,
        recipe.preprocess,
        run_folder.workspace,
        opened.identity(),
        run_folder.examples(),
    )
    buffers = merge_buffers(run_folder, recipe, opened, coefficients)
    return CheckpointMerge(opened.base, task_vectors, coefficients, rule, buffers=buffers)


def check_no_buffers(merge: CheckpointMerge, run: RunFolder) -> None:
    """Raise ValueError for a merge with statistics of batch norms that are not the base's."""
    if merge.buffers:
        raise ValueError(
            f"{run.path}: its merge has statistics of batch norms of its own (recipe.buffers), which "
            "neither an adapter nor a packed folder holds: export a checkpoint"
        )
