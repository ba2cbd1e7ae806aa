"""What can be written as a checkpoint: tensors computed on request, in pieces of rows."""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from torch import Tensor

from trainmerge.checkpoints import Checkpoint, side_folder
from trainmerge.export.form import Form
from trainmerge.system.safetensors_file import TensorInfo


class Tensors(Protocol):
    """The tensors of a checkpoint that is computed on request."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Their headers."""

    @property
    def shards(self) -> Mapping[str, tuple[str, ...]]:
        """File name -> its tensors."""

    @property
    def after(self) -> Mapping[str, tuple[str, ...]]:
        """Path -> tensors, of modules after the model with a merged tensor."""

    def in_file(self, name: str) -> str:
        """A tensor's name in its file."""

    def merged(self, name: str) -> bool:
        """Whether a tensor is merged; others are copies."""

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor as consecutive pieces of rows."""

    def read_ahead_of(self, name: str) -> None:
        """Ask the kernel to read ahead the pages that `pieces` will need."""


class Merged(Tensors, Protocol):
    """The tensors of a merged checkpoint, under the names of its base's files."""

    @property
    def base(self) -> Checkpoint:
        """The checkpoint whose names, shapes and side files the merge has."""

    @property
    def form(self) -> Form:
        """Its dtype and files."""


class OnlyModel:
    """The part of `Tensors` about modules after the model, where none is merged."""

    @property
    def after(self) -> Mapping[str, tuple[str, ...]]:
        """None."""
        return {}

    def in_file(self, name: str) -> str:
        """Its name."""
        return name


def side_files(base: Checkpoint, merged: Callable[[str], bool]) -> dict[str, tuple[str, ...]]:
    """Path -> tensors, of a base's modules after the model with a merged tensor."""
    found: dict[str, list[str]] = {}
    for name in base.side:
        found.setdefault(f"{side_folder(name)}/model.safetensors", []).append(name)
    return {file: tuple(names) for file, names in found.items() if any(map(merged, names))}


def name_in_file(base: Checkpoint, name: str) -> str:
    """A tensor's name in its file: without its folder, if it is of a module after the model."""
    return base.side[name].name if name in base.side else name
