"""The tensors of a document's merge, computed while they are written."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from trainmerge.export.form import Form
from trainmerge.export.shards import finite
from trainmerge.merging.document import Document
from trainmerge.merging.group import Group
from trainmerge.system.safetensors_file import TensorInfo


class Base(Protocol):
    """Mapped files, whose names and shapes the merge has."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The headers."""

    def read(self, name: str, /) -> Tensor:
        """A tensor, mapped."""


B = TypeVar("B", bound=Base)


@dataclass(frozen=True)
class MergedTensors(Generic[B]):
    """Each tensor by the document's method, or as the base has it."""

    base: B
    form: Form
    document: Document
    groups: Mapping[str, Group]
    faithful: bool

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The headers of the merged files."""
        return self.form.headers(self.base.tensors)

    def group_of(self, name: str) -> Group | None:
        """The models' values of a tensor; None for a copy."""
        return self.groups.get(name)

    def merged(self, name: str) -> bool:
        """Whether a tensor is merged; others are copies."""
        return self.group_of(name) is not None

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor as consecutive pieces of rows.

        Raises:
            ValueError: a merged number is not finite.
        """
        info, group = self.base.tensors[name], self.group_of(name)
        dtype = self.form.dtype_of(info)
        if group is None:
            yield finite(name, self.base.read(name).to(dtype), info.dtype)
            return
        rule = self.document.definition.rule(group, self.faithful)
        for piece in group.pieces():
            out = rule(piece).to(dtype)
            if not bool(torch.isfinite(out).all()):
                raise ValueError(f"{name}: the merged tensor is not finite; check the weights, or the models")
            yield out if info.shape else out.view(info.shape)
