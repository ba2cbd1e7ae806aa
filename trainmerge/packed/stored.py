"""Packed experts on disk: opened, checked against their base, and decoded by task.

Legend: `r` some rows of a parameter, `W` entries of a row.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from trainmerge.checkpoints import Checkpoint, fingerprint, open_checkpoint, same_weights
from trainmerge.checkpoints.whole import PACKED, check_whole
from trainmerge.kernels import accumulation_dtype
from trainmerge.packed.codec import decode
from trainmerge.packed.parameter import as_matrix, blocks
from trainmerge.packed.record import NONE, REMEDY, PackedRecord, read_record
from trainmerge.packed.router import TaskRouter
from trainmerge.system.access import is_folder
from trainmerge.system.hub import folder_of, parse_id
from trainmerge.system.safetensors_file import MappedFile

OWN, SHARED = "mtUVzd", "usb"  # kinds of parts


@dataclass(frozen=True)
class Stored:
    """The tensors of a folder of packed experts, and its base. Headers are read, tensors on request."""

    path: Path
    record: PackedRecord
    base: Checkpoint
    files: Mapping[str, MappedFile]  # tensor -> its file

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the experts."""
        return tuple(self.record.tasks)

    def check_task(self, task: str) -> None:
        """Raise ValueError for a task that is not in the folder."""
        if task not in self.record.tasks:
            raise ValueError(f"{self.path}: no task {task!r}; it has {', '.join(self.record.tasks)}")

    def changes(self, name: str) -> bool:
        """Whether some task changes this tensor of the base's files."""
        found = self.record.tensors.get(self.base.tied.get(name, name))
        return found is not None and found.codec != NONE

    def pieces(self, name: str, task: str) -> Iterator[Tensor]:
        """A tensor of the base's files for one task, as pieces of rows in the base's dtype, rounded once.

        Raises:
            ValueError: a part is missing, or of another shape.
        """
        base = self.base.read(name)
        if not self.changes(name):
            yield base
            return
        wide = base.reshape(as_matrix(base.shape))
        for part, difference in self.difference(name, task):
            rows = (wide[part].to(accumulation_dtype(base.dtype)) + difference).to(base.dtype)
            yield rows.reshape(-1, *base.shape[1:]) if base.dim() else rows.reshape(())

    def difference(self, name: str, task: str) -> Iterator[tuple[slice, Tensor]]:
        """One task's difference of a packed tensor, [r, W] float32, by rows of the tensor as a matrix."""
        parameter = self.base.tied.get(name, name)
        shape = as_matrix(torch.Size(self.record.tensors[parameter].shape))
        shared = self._parts(SHARED, parameter)
        own = self._parts(OWN, f"{task}/{parameter}")
        scale = float(self.scales[task][self._order[parameter]])
        try:
            for part in blocks(shape):
                made = decode(shared, own, scale, shape, part)
                if made.shape != (part.stop - part.start, shape[1]):
                    raise ValueError(f"{tuple(made.shape)}")
                yield part, made
        except (RuntimeError, KeyError, ValueError, IndexError) as error:
            raise ValueError(
                f"{self.path}: the parts of {parameter} do not fit its shape. {REMEDY}"
            ) from error

    def head(self, task: str) -> dict[str, Tensor]:
        """The tensors of a task's own head."""
        start = f"h/{task}/"
        return {name.removeprefix(start): self._read(name) for name in self.files if name.startswith(start)}

    @cached_property
    def router(self) -> TaskRouter:
        """The router. Raises ValueError if there is none."""
        if self.record.router is None:
            raise ValueError(f"{self.path} has no router: export the run again, with --router")
        router = TaskRouter(self._read("router/weight"), self._read("router/bias"))
        if (router.weight.dim(), len(router.weight), len(router.bias)) != (2, *[len(self.tasks)] * 2):
            raise ValueError(f"{self.path}: the router is not one of its tasks. {REMEDY}")
        return router

    @cached_property
    def scales(self) -> dict[str, Tensor]:
        """Task -> its scale of every packed parameter, float32."""
        found = {task: self._read(f"a/{task}") for task in self.record.tasks}
        if any(scale.shape != (len(self.record.tensors),) for scale in found.values()):
            raise ValueError(f"{self.path}: not one scale per tensor. {REMEDY}")
        return found

    @cached_property
    def _order(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.record.tensors)}

    def _parts(self, kinds: str, name: str) -> dict[str, Tensor]:
        return {kind: self._read(f"{kind}/{name}") for kind in kinds if f"{kind}/{name}" in self.files}

    def _read(self, name: str) -> Tensor:
        if name not in self.files:
            raise ValueError(f"{self.path}: {name} is missing. {REMEDY}")
        return self.files[name].read(name)


def open_stored(path: str | Path, base: str | Path | None, allow_pickle: bool) -> Stored:
    """Open a folder; the base's files are read once, for their checksums.

    Args:
        path: The folder.
        base: The base, if it is no longer where the folder names it: a folder, or an id on the hub.
        allow_pickle: Read a base of `.bin` files.

    Raises:
        FileNotFoundError: the folder, one of its files or the base is missing.
        ValueError: a damaged folder, or another base than the experts were packed with.
    """
    folder = Path(path)
    record = read_record(folder)
    check_whole(folder)
    place = _base_of(folder, record) if base is None else folder_of(str(base), True, allow_pickle)
    if not place.is_dir():
        raise FileNotFoundError(f"{folder}: its base is not at {place}: name its folder, with `base`")
    checkpoint = open_checkpoint(place, allow_pickle, record.tied)
    if not same_weights(record.base["sha256"], fingerprint(place)):
        raise ValueError(
            f"{place} is not the base that {folder} was packed with: its files have other checksums. "
            "Name the right one"
        )
    files = [MappedFile(folder / file) for file in record.files]
    stored = Stored(folder, record, checkpoint, {name: file for file in files for name in file.tensors})
    _check_shapes(stored)
    return stored


def _base_of(folder: Path, record: PackedRecord) -> Path:
    path = record.base["path"]
    if parse_id(path) is not None and not is_folder(folder / path):
        return folder_of(path)
    return Path(os.path.normpath(folder / path))


def _check_shapes(stored: Stored) -> None:
    """Raise ValueError if a packed parameter is not in the base, or has another shape there."""
    known = stored.base
    wrong = [
        name
        for name, one in stored.record.tensors.items()
        if not (name in known.tensors or name in known.side) or list(known.info(name).shape) != [*one.shape]
    ]
    if wrong:
        raise ValueError(f"{stored.path / PACKED}: not tensors of its base: {', '.join(wrong[:3])}. {REMEDY}")
