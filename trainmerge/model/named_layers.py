"""The modules whose weights are merged."""

from collections.abc import Callable, Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D

from trainmerge.model.merged_model import MergedModel
from trainmerge.task_vectors.roles import LINEAR


def linear_layers(merged: MergedModel, names: Iterable[str]) -> dict[str, nn.Module]:
    """The linear layer (nn.Linear, Conv1D) of each parameter that is one's weight."""
    deltas = merged.task_vectors.deltas
    linear = [name for name in names if deltas[name].role in LINEAR]
    return _owners(merged, linear, lambda module: isinstance(module, nn.Linear | Conv1D))


def norms(merged: MergedModel, names: Iterable[str]) -> dict[str, nn.Module]:
    """The module of each vector that is one's weight: a norm."""
    deltas = merged.task_vectors.deltas
    vectors = [name for name in names if deltas[name].role == "vector" and len(deltas[name].shape) == 1]
    return _owners(merged, vectors, lambda module: isinstance(getattr(module, "weight", None), nn.Parameter))


def _owners(
    merged: MergedModel, names: Iterable[str], kind: Callable[[nn.Module], bool]
) -> dict[str, nn.Module]:
    """The module of this kind of each parameter that is one's weight."""
    owners = {id(module.weight): module for module in merged.module.modules() if kind(module)}
    found = {name: owners.get(id(merged.parameters[name])) for name in names}
    return {name: module for name, module in found.items() if module is not None}
