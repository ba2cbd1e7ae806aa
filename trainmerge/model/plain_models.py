"""Base and experts as state dicts: from modules, files, or the user's own.

Legend: `K` experts.
"""

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainmerge.checkpoints.state_dict_files import load_state_dict
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.system.text import listed
from trainmerge.task_vectors.delta import TaskVectors
from trainmerge.task_vectors.parameter_names import matches
from trainmerge.task_vectors.state_dicts import Compared, StateDict, compare_state_dicts

ModelWeights = StateDict | nn.Module | str | Path  # what a state dict can be taken from


@dataclass(frozen=True)
class PlainModels:
    """The state dicts of base and experts, compared."""

    base: dict[str, Any]  # every entry of the base's state dict, ignored ones too
    compared: Compared
    task_vectors: TaskVectors  # before preprocessing

    def merged(self, task_vectors: TaskVectors, coefficients: Coefficients) -> dict[str, Any]:
        """The base's state dict with merged parameters, on the base's devices; everything else is a copy.

        Raises:
            ValueError: a merged number is not finite.
        """
        values = coefficients().detach().cpu()
        state: dict[str, Any] = {}
        for name, own in self.base.items():
            if owner := self.compared.ties.get(name):
                state[name] = state[owner]
            elif name in coefficients.layout.groups:
                delta = task_vectors.deltas[name]
                out = torch.empty_like(delta.base, memory_format=torch.contiguous_format)
                delta.merge(out, coefficients.of(name, values))
                state[name] = out.to(own.device)
            else:
                state[name] = own.detach().clone() if isinstance(own, Tensor) else deepcopy(own)
        bad = [n for n in coefficients.layout.groups if not bool(state[n].isfinite().all())]
        if bad:
            raise ValueError(
                f"{listed(bad)}: merged to NaN or infinity; check base, experts and coefficients"
            )
        return state


def open_models(
    base: ModelWeights,
    experts: Mapping[str, ModelWeights],
    ignore: Sequence[str] = (),
    allow_pickle: bool = False,
) -> PlainModels:
    """Read and compare base and experts: modules, state dicts, or paths.

    A module as the base also says which tensors are buffers, and what each parameter is in its layer.

    Raises:
        ValueError: lists every mismatch.
    """
    own = state_of(base, allow_pickle)
    others = {name: state_of(expert, allow_pickle) for name, expert in experts.items()}
    buffers: list[str] = []
    roles = {}
    if isinstance(base, nn.Module):
        from trainmerge.checkpoints.roles import roles_of  # imports transformers

        parameters = {name for name, _ in base.named_parameters(remove_duplicate=False)}
        buffers, roles = [name for name in own if name not in parameters], roles_of(base)
    compared = compare_state_dicts(own, others, ignore, buffers)
    _warn_of_ignored(own, others, ignore)
    return PlainModels(own, compared, TaskVectors.of_compared(own, compared, roles))


def _warn_of_ignored(base: StateDict, experts: Mapping[str, StateDict], ignore: Sequence[str]) -> None:
    """Warn of tensors that `ignore` names and an expert changed; a head of another size is its own."""
    ignored = [n for n, own in base.items() if isinstance(own, Tensor) and matches(n, ignore)]
    for expert, state in experts.items():
        tensors = {n: state[n] for n in ignored if isinstance(state.get(n), Tensor)}
        both = {n: own for n, own in tensors.items() if own.shape == base[n].shape}
        if changed := [n for n, own in both.items() if not torch.equal(base[n], own.to(base[n]))]:
            warnings.warn(
                f"expert {expert} changed {listed(changed)}, which `ignore` leaves at the base's values: "
                "neither the merge nor this expert's outputs in a fit contain that change. Narrow `ignore` "
                "to tensors that the base lacks, or put the expert's own head on the merge",
                stacklevel=4,
            )


def state_of(given: ModelWeights, allow_pickle: bool = False) -> dict[str, Any]:
    """The state dict of a module, of a path, or itself."""
    if isinstance(given, nn.Module):
        return given.state_dict()
    return load_state_dict(given, allow_pickle=allow_pickle) if isinstance(given, str | Path) else dict(given)
