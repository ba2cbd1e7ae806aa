"""The task vectors' tensors inside a module: parameters, or places in them (`task_vectors.places`).

Legend: `K` experts, `C` chunks.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from trainmerge.model.row_shards import RowShard, local, shares_storage
from trainmerge.task_vectors.delta import Delta
from trainmerge.task_vectors.places import is_place, parameter_of, view


@dataclass(frozen=True)
class Placed:
    """Where each tensor is in the module."""

    inside: Mapping[str, str]  # tensor's name -> its parameter's or place's name
    owners: Mapping[str, nn.Parameter]  # tensor's name -> its parameter

    @staticmethod
    def of(module: nn.Module, tensors: Iterable[str], names: Mapping[str, str]) -> "Placed":
        """These tensors; `names` are those in the module that differ from the tensors'.

        Raises:
            KeyError: the module has no such parameter.
        """
        own = dict(module.named_parameters())
        inside = {name: names.get(name, name) for name in tensors}
        return Placed(inside, {name: own[parameter_of(place)] for name, place in inside.items()})

    @cached_property
    def shards(self) -> Mapping[str, RowShard]:
        """The rows of this process, of tensors whose parameters are sharded."""
        found = {name: RowShard.of(self.inside[name], owner) for name, owner in self.owners.items()}
        return {name: shard for name, shard in found.items() if shard is not None}

    def views(self) -> dict[str, Tensor]:
        """Every tensor's parameter itself, or a view of its place: of this process's rows, if sharded."""
        return {
            name: self.part(name, local(self.owners[name].data)) if is_place(inside) else self.owners[name]
            for name, inside in self.inside.items()
        }

    def part(self, name: str, whole: Tensor) -> Tensor:
        """The part of its parameter's memory, or of this process's shard of that, that is one tensor's."""
        return self.shards[name].part(whole) if name in self.shards else view(self.inside[name], whole)

    def written(self, name: str, unseen: bool = False) -> Tensor:
        """The memory of one tensor, or this process's rows of it, as they are now.

        With `unseen`, autograd does not see what is written.
        """
        owner = self.owners[name]
        return self.part(name, local(owner.data if unseen else owner))

    def by_owner(self, names: Iterable[str]) -> list[tuple[str, ...]]:
        """The names that share a parameter, together."""
        found: dict[int, list[str]] = {}
        for name in names:
            found.setdefault(id(self.owners[name]), []).append(name)
        return [tuple(together) for together in found.values()]

    def moved(self, parts: Sequence[tuple[str, int]], inner: Tensor) -> set[str]:
        """The places among `parts` (names, numbers of columns) whose inner products [K, C] are not all 0."""
        if not any(is_place(self.inside[name]) for name, _ in parts):
            return set()
        columns = torch.split(inner.abs().amax(0), [count for _, count in parts])
        pairs = zip(parts, columns, strict=True)
        return {name for (name, _), own in pairs if is_place(self.inside[name]) and bool(own.any())}

    def parts(self, names: Iterable[str]) -> list[str]:
        """The names that are places, experts of a mixture say."""
        return [name for name in names if is_place(self.inside[name])]


def check_apart(parameters: Mapping[str, Tensor], deltas: Mapping[str, Delta]) -> None:
    """Raise ValueError if a parameter, which the merge overwrites, shares storage with its base."""
    if aliased := [name for name, own in parameters.items() if shares_storage(own, deltas[name].base)]:
        raise ValueError(
            f"the model's weights share storage with the base of {aliased[:3]}: give the task vectors a copy"
        )
