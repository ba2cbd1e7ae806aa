"""What an adapter is made from, and the checks before any factor is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

from trainmerge.checkpoints import Checkpoint
from trainmerge.export.adapter_form import AdapterForm
from trainmerge.system.text import listed
from trainmerge.task_vectors.changes import Change

if TYPE_CHECKING:  # imports transformers and peft
    from trainmerge.checkpoints import LoraTargets


@dataclass(frozen=True)
class AdapterSource:
    """What an adapter is made from.

    Args:
        base: The checkpoint that it will be loaded on.
        targets: Its modules.
        changes: Tensor of the base's files -> its change; tensors that nothing changes are left out.
        base_id: The base's id on the hub, and its commit, where they are known.
        label: For errors: the run, or the expert.
    """

    base: Checkpoint
    targets: "LoraTargets"
    changes: Mapping[str, Change]
    base_id: tuple[str | None, str | None] = (None, None)
    label: str = "the merge"

    def divided(self, form: AdapterForm) -> tuple[list[str], list[str]]:
        """Tensors that become factors, and the rest."""
        modules: list[str] = []
        rest: list[str] = []
        for name, change in self.changes.items():
            target = self.targets.modules.get(name)
            fits = target and (target.kind != "embedding" or form.embeddings or change.low_rank)
            (modules if fits else rest).append(name)
        return modules, rest


def check_rest(
    source: AdapterSource, form: AdapterForm, modules: Sequence[str], rest: Mapping[str, float]
) -> None:
    """Raise ValueError for changes outside of all modules, with their share of the norm."""
    after = [name for name in rest if name not in source.targets.parameters]
    if after and form.rest == "patch":
        raise ValueError(
            f"{source.label} changes {listed(after)}, of layers after the model or of experts that share a "
            "parameter, which neither an adapter nor a patch of the model reaches: export a checkpoint, or "
            "leave them out with --rest leave"
        )
    if not rest or form.rest is not None:
        return
    square = sum(rest.values())
    whole = square + sum(source.changes[name].square() for name in modules)
    worst = sorted(rest, key=lambda name: -rest[name])
    raise ValueError(
        f"{source.label} changes {len(rest)} tensors that a LoRA does not hold (norms, biases, embeddings, "
        f"weights outside of linear layers): {listed(worst)}. They are {sqrt(square / whole):.2%} of the "
        f"change's norm, {square / whole:.2%} of its square. Write them to a file of differences with --rest "
        "patch, leave them out with --rest leave, factor embeddings with --embeddings, or export a checkpoint"
    )


def check_budget(source: AdapterSource, form: AdapterForm, modules: Sequence[str]) -> None:
    """Raise ValueError for dense changes without a bound, which would be factors of full rank."""
    dense = [name for name in modules if not source.changes[name].low_rank]
    if dense and form.budget.is_open:
        raise ValueError(
            f"{source.label} changes {listed(dense)} by more than adapters, so their ranks are full: name a "
            "--rank, or the share of the squared norm to keep, --energy 0.95"
        )
