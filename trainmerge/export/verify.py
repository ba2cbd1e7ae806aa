"""Verify an export: merge its run again and compare bitwise."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from trainmerge.checkpoints.whole import COEFFICIENTS, MANIFEST, export_manifest
from trainmerge.export.adapter import CONFIG
from trainmerge.export.export import INDEX, merge_of
from trainmerge.export.export_adapter import AdapterMerge, adapter_of
from trainmerge.export.form import Form
from trainmerge.export.side_files import WEIGHTS
from trainmerge.export.task import TaskMerge, own_head, task_of
from trainmerge.export.tensors import Tensors
from trainmerge.run.folder import RunFolder
from trainmerge.run.open_run import open_run
from trainmerge.system.atomic import temporary_folder
from trainmerge.system.json_file import read_json
from trainmerge.system.safetensors_file import MappedFile, flat_bytes, sha256
from trainmerge.system.text import listed

SHOWN = 8  # problems that the error lists


def verify_export(run: str | Path, out: str | Path) -> int:
    """Merge again and compare with the folder `out`; returns the number of tensors compared.

    Names, shapes, dtypes, the index and the bits of every tensor must agree; further weights are an error.

    Raises:
        ValueError: lists the first differences.
    """
    run_folder, folder = RunFolder(Path(run)), Path(out)
    recipe, coefficients, opened = open_run(run_folder)
    if (form := adapter_of(folder)) is not None:
        merged = merge_of(run_folder, recipe, coefficients, opened)
        return _verify_adapter(AdapterMerge(merged, opened, recipe, form), run_folder.path, folder)
    plain = replace(merge_of(run_folder, recipe, coefficients, opened), form=_form(folder))
    merge: Tensors = plain
    if task := task_of(folder):
        merge = TaskMerge.of(plain, own_head(recipe, opened, task))
    return compare_tensors(merge, run_folder.path, folder)


def compare_tensors(merge: Tensors, run: Path, folder: Path) -> int:
    """Compare a folder's weights with tensors that are computed again; returns their number.

    Raises:
        ValueError: lists the first differences.
    """
    problems = list(_differences(merge, folder))
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:SHOWN])
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError(
            f"{folder} is not the export of {run}; export it again. "
            f"{len(problems)} differences:\n{shown}{more}"
        )
    return len(merge.tensors)


def _verify_adapter(merge: AdapterMerge, run: Path, folder: Path) -> int:
    """Write the adapters again, next to the folder, and compare the files; returns the number of tensors."""
    whole = folder.resolve()
    with temporary_folder(whole.parent, f"{whole.name}.verify") as place:
        _, made = merge.write(place)
        configs = [str(path.relative_to(place)) for path in place.rglob(CONFIG)]
        wanted = made | {name: sha256(place / name) for name in configs}
        there = {name: sha256(folder / name) for name in wanted if (folder / name).is_file()}
        if wrong := sorted(name for name in wanted if there.get(name) != wanted[name]):
            raise ValueError(
                f"{folder} is not the export of {run}; export it again. It differs in {listed(wrong, SHOWN)}"
            )
        return sum(len(MappedFile(place / name).tensors) for name in made)


def _form(folder: Path) -> Form:
    """The dtype and shard size of an export, as its manifest has them."""
    return Form.read(export_manifest(folder).get("form"), folder / MANIFEST)


def _differences(merge: Tensors, folder: Path) -> Iterator[str]:
    shards = dict(merge.shards)
    there = {path.name for path in folder.glob("*") if path.suffix in WEIGHTS}
    own = {COEFFICIENTS}
    yield from (f"{file} is missing" for file in shards if file not in there)
    yield from (f"{file} is not part of the export" for file in sorted(there - shards.keys() - own))
    if len(shards) > 1:
        yield from _index_differences(shards, folder / INDEX)
    after = dict(merge.after)
    yield from (f"{file} is missing" for file in after if not (folder / file).is_file())
    for file, names in (shards | after).items():
        if (folder / file).is_file():
            yield from _shard_differences(merge, names, folder / file)


def _index_differences(shards: dict[str, tuple[str, ...]], index: Path) -> Iterator[str]:
    homes = {name: file for file, names in shards.items() for name in names}
    try:
        written = read_json(index, "Export the run again.")["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"{index.name} cannot be read ({error})"
        return
    yield from (
        f"{index.name} has {name} in {written.get(name)}, it belongs in {homes.get(name)}"
        for name in sorted(homes.keys() | written.keys())
        if homes.get(name) != written.get(name)
    )


@torch.no_grad()
def _shard_differences(merge: Tensors, names: tuple[str, ...], path: Path) -> Iterator[str]:
    try:
        file = MappedFile(path)
    except ValueError as error:
        yield str(error)
        return
    keys = {name: merge.in_file(name) for name in names}
    strange = file.tensors.keys() - set(keys.values())
    yield from (f"{path.name}: {name} does not belong there" for name in file.tensors if name in strange)
    infos = merge.tensors
    for name, key in keys.items():
        want = infos[name]
        got = file.tensors.get(key)
        if got is None:
            yield f"{path.name}: {name} is missing"
        elif (got.dtype, got.shape) != (want.dtype, want.shape):
            shapes = tuple(got.shape), tuple(want.shape)
            yield f"{path.name}: {name} is {got.dtype} {shapes[0]}, not {want.dtype} {shapes[1]}"
        elif changed := _changed(merge, name, file.read(key)):
            what = "merged" if merge.merged(name) else "not merged"
            yield f"{path.name}: {name} ({what}) differs in {changed} of {want.shape.numel()} numbers"


def _changed(merge: Tensors, name: str, got: Tensor) -> int:
    """The number of elements whose bits differ from the merge."""
    place, changed = 0, 0
    for piece in merge.pieces(name):
        theirs = got.reshape(-1)[place : place + piece.numel()]
        if not torch.equal(flat_bytes(theirs), flat_bytes(piece)):
            wrong = (flat_bytes(theirs) != flat_bytes(piece)).view(piece.numel(), -1).any(dim=1)
            changed += int(wrong.sum())
        place += piece.numel()
    return changed
