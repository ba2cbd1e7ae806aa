"""One packed expert as an ordinary checkpoint folder, written tensor by tensor."""

import json
from pathlib import Path

import torch

from trainmerge.export.explain import write_export_manifest
from trainmerge.export.export import check_target, write_checkpoint
from trainmerge.export.shards import write_shard
from trainmerge.export.side_files import copy_base_files
from trainmerge.packed.stored import open_stored
from trainmerge.packed.task_tensors import FILE, HeadedTask, task_tensors
from trainmerge.system.disk_space import check_free_space
from trainmerge.system.staging import staging


def unpack(
    path: str | Path,
    task: str,
    out: str | Path,
    base: str | Path | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
) -> Path:
    """Write one packed expert as an ordinary checkpoint folder that transformers loads.

    An expert with a head of its own becomes a checkpoint of its own class. Memory holds a few rows.

    Args:
        path: The folder of `trainmerge export --as packed`.
        task: The expert's name.
        out: The folder to create.
        base: The base, if it is no longer where the folder names it: a folder, or an id on the hub.
        overwrite: Replace `out` if it exists.
        allow_pickle: Read a base of `.bin` files.

    Raises:
        FileExistsError: `out` exists and `overwrite` is not set.
        FileNotFoundError: the folder, one of its files or the base is missing.
        ValueError: an unknown task, a damaged folder, another base, or an `out` that holds an input.
    """
    stored, target = open_stored(path, base, allow_pickle), Path(out)
    found = task_tensors(stored, task)
    check_target(target, [stored.path, stored.base.path])
    with torch.no_grad(), staging(target, overwrite) as folder:
        if isinstance(found, HeadedTask):
            made, more = _write_headed(found, folder), {"task": task}
        else:
            made, more = write_checkpoint(found, folder), {}
        told = {"unpacked": task, "error": stored.record.errors[task]}
        write_export_manifest(folder, made, None, more | told)
    return target


def _write_headed(found: HeadedTask, folder: Path) -> dict[str, str]:
    """Weights of the expert's class, the base's side files, and the class's config.json."""
    stored = found.plain.stored
    check_free_space(folder, sum(info.nbytes for info in found.tensors.values()))
    digest = write_shard(found, found.tensors, folder / FILE)
    stored.base.check_unchanged()
    copy_base_files(stored.base, folder)
    config = json.dumps(stored.record.heads[found.plain.task].config, indent=2) + "\n"
    (folder / "config.json").write_text(config)
    return {FILE: digest}
