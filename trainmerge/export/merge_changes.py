"""A merge, or each expert on top of it, as changes of the base's parameters.

Legend: `K` experts, `C` chunks of one parameter.
"""

import torch

from trainmerge.export.shards import CheckpointMerge
from trainmerge.task_vectors.changes import Change
from trainmerge.task_vectors.delta import TaskVectors


def merge_changes(merge: CheckpointMerge) -> dict[str, Change]:
    """merged - base: sum_k c_k tau_k, of every merged tensor that some expert changes."""
    values = merge.coefficients().detach().double()
    groups = merge.coefficients.layout.groups
    found = {
        name: Change(name, delta, merge.coefficients.of(name, values), merge.rule)
        for name, delta in merge.task_vectors.deltas.items()
        if name in groups
    }
    return {name: change for name, change in found.items() if change.used}


def expert_changes(merge: CheckpointMerge, raw: TaskVectors, expert: int) -> dict[str, Change]:
    """expert - merged: tau_k - sum_j c_j tau'_j, with tau' the preprocessed differences.

    An adapter of LoRA experts without preprocessing has no more columns than all experts together. Tensors
    that are not merged have the base's values in the merge, and the expert's own difference here.
    """
    values = merge.coefficients().detach().double()
    groups = merge.coefficients.layout.groups
    found = {}
    for name, delta in raw.deltas.items():
        own = torch.zeros(len(raw.experts), 1, dtype=torch.float64)
        own[expert] = 1
        if name not in groups:
            found[name] = Change(name, delta, own)
            continue
        merged = merge.coefficients.of(name, values)
        if merge.rule is None and merge.task_vectors is raw:
            found[name] = Change(name, delta, own - merged)
        else:
            weights = torch.cat([-merged, torch.ones(1, merged.shape[1], dtype=torch.float64)])
            plus = (delta.terms[expert],)
            found[name] = Change(name, merge.task_vectors.deltas[name], weights, merge.rule, plus)
    return {name: change for name, change in found.items() if change.used}
