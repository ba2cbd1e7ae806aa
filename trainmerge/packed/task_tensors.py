"""One packed task as the tensors of an ordinary checkpoint, computed on request."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trainmerge.checkpoints import Checkpoint
from trainmerge.export.form import Form
from trainmerge.export.tensors import OnlyModel, name_in_file, side_files
from trainmerge.packed.stored import Stored
from trainmerge.system.safetensors_file import TensorInfo, read_ahead

FILE = "model.safetensors"


@dataclass(frozen=True)
class PlainTask:
    """One task as a checkpoint of the base's class."""

    stored: Stored
    task: str

    @property
    def base(self) -> Checkpoint:
        """The base."""
        return self.stored.base

    @property
    def form(self) -> Form:
        """The base's own dtypes and files."""
        return Form()

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The headers of all tensors, changed ones of modules after the model too."""
        after = [name for names in self.after.values() for name in names]
        return {**self.base.tensors, **{name: self.base.info(name) for name in after}}

    @cached_property
    def after(self) -> Mapping[str, tuple[str, ...]]:
        """Path -> tensors, of modules after the model with a changed tensor."""
        return side_files(self.base, self.merged)

    @cached_property
    def shards(self) -> Mapping[str, tuple[str, ...]]:
        """File name -> its tensors."""
        return self.form.shards(self.base)

    def in_file(self, name: str) -> str:
        """A tensor's name in its file."""
        return name_in_file(self.base, name)

    def merged(self, name: str) -> bool:
        """Whether some task changes a tensor; others are bitwise the base's."""
        return self.stored.changes(name)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor for this task, as pieces of rows."""
        return self.stored.pieces(name, self.task)

    def read_ahead_of(self, name: str) -> None:
        """Ask the kernel to read ahead the base's pages."""
        read_ahead(self.base.read(name))


@dataclass(frozen=True)
class HeadedTask(OnlyModel):
    """One task as a checkpoint of its expert's class, with its own head."""

    plain: PlainTask

    @cached_property
    def own(self) -> Mapping[str, Tensor]:
        """The head's tensors."""
        return self.plain.stored.head(self.plain.task)

    @property
    def shared(self) -> Mapping[str, str]:
        """Tensor of the class -> the base's."""
        return self.plain.stored.record.heads[self.plain.task].shared

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The headers of all tensors."""
        own = {name: TensorInfo(t.dtype, t.shape, self.plain.stored.path) for name, t in self.own.items()}
        return {name: self.plain.base.info(base) for name, base in self.shared.items()} | own

    @property
    def shards(self) -> Mapping[str, tuple[str, ...]]:
        """One file."""
        return {FILE: tuple(self.tensors)}

    def merged(self, name: str) -> bool:
        """Whether some task changes a tensor that the base has."""
        return name in self.shared and self.plain.merged(self.shared[name])

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor for this task, as pieces of rows."""
        if name in self.own:
            yield self.own[name]
        else:
            yield from self.plain.pieces(self.shared[name])

    def read_ahead_of(self, name: str) -> None:
        """Ask the kernel to read ahead the pages that `pieces` will need."""
        if name not in self.own:
            self.plain.read_ahead_of(self.shared[name])


def task_tensors(stored: Stored, task: str) -> PlainTask | HeadedTask:
    """The tensors of one task, with its own head if it has one. Raises ValueError for an unknown task."""
    stored.check_task(task)
    plain = PlainTask(stored, task)
    return HeadedTask(plain) if task in stored.record.heads else plain


def read_whole(found: PlainTask | HeadedTask, name: str) -> Tensor:
    """A tensor in one piece, of its own memory."""
    pieces = list(found.pieces(name))
    return pieces[0].clone() if len(pieces) == 1 else torch.cat(pieces)
