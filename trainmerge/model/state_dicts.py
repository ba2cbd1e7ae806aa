"""Merge state dicts, without folders: a few lines for any module of torch.

Legend: `K` experts, `G` coefficient groups.
"""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.layout import Grouping
from trainmerge.model.batch_norm import Forward, batch_norm_statistics, batch_norms, call
from trainmerge.model.plain_models import ModelWeights, PlainModels, open_models
from trainmerge.preprocess import Preprocess, apply_in_memory
from trainmerge.system.ranges import check_option
from trainmerge.system.text import listed
from trainmerge.task_vectors.buffers import BufferRule, average_buffers, warn_of_own_buffers
from trainmerge.task_vectors.delta import TaskVectors
from trainmerge.task_vectors.state_dicts import STATISTICS

Loaders = Mapping[str, Iterable[Any]]  # expert -> batches of its task


def merge_state_dicts(
    base: ModelWeights,
    experts: Mapping[str, ModelWeights],
    coefficients: float | Mapping[str, float] | Coefficients,
    *,
    preprocess: Sequence[Preprocess] = (),
    buffers: BufferRule | None = None,
    weights: Mapping[str, float] | None = None,
    loaders: Loaders | None = None,
    forward: Forward = call,
    ignore: Sequence[str] = (),
    allow_pickle: bool = False,
) -> dict[str, Tensor]:
    """base + sum_k c_k tau_k of state dicts, as a new state dict in the base's dtypes, rounded once.

    The same weights in folders of transformers give the same numbers (`tm.export_merge`).

    Args:
        base: A state dict, a module, or a path (`tm.load_state_dict`). A module also says what each parameter
            is in its layer, as a folder does: methods such as `Tsv` treat embeddings and convolutions apart.
        experts: Name -> the same of each expert.
        coefficients: One for all, one per expert's name, or the coefficients of a fit.
        preprocess: Applied to the task vectors, in order, in memory: K float32 copies of the weights.
        buffers: `keep` the base's; `average` those of the experts; `reestimate` the statistics of batch norms
            on `loaders`, which needs a module as the base. None keeps them, and warns if an expert's differ.
        weights: Of the experts in averaged buffers; by default equal.
        loaders: Expert -> batches of its task, without labels, for `reestimate`.
        forward: Runs a module on such a batch; by default `module(batch)`, of a tuple its first entry.
        ignore: fnmatch patterns of tensors that are not merged and keep the base's value: own heads.
        allow_pickle: Read files of torch.save too. Pickle can run code; use it for files that you trust.

    Raises:
        ValueError: lists every difference of names, shapes and kinds; coefficients of other experts or
            parameters; a result that is not finite.
    """
    names = tuple(experts)
    check_buffers(buffers, base, loaders)
    shares = task_weights(weights, names)
    models = open_models(base, experts, ignore, allow_pickle)
    chosen = _coefficients(coefficients, names, models.task_vectors)
    merged = models.merged(apply_in_memory(models.task_vectors, preprocess), chosen)
    merged |= rule_buffers(models, buffers, shares)
    if buffers == "reestimate":
        assert isinstance(base, nn.Module)
        assert loaders is not None
        module = deepcopy(base)
        module.load_state_dict(merged)
        merged |= batch_norm_statistics(module, chain.from_iterable(loaders.values()), forward)
    return merged


def check_buffers(rule: BufferRule | None, base: ModelWeights, loaders: Loaders | None) -> None:
    """Raise ValueError for a rule that cannot be followed."""
    check_option("buffers", rule, BufferRule | None)
    if rule != "reestimate":
        return
    if not isinstance(base, nn.Module) or not loaders:
        raise ValueError("buffers='reestimate' runs the merge: give a module as the base, and `loaders`")
    if not batch_norms(base):
        raise ValueError("buffers='reestimate': the module has no batch norm with running statistics")


def task_weights(given: Mapping[str, float] | None, names: Sequence[str]) -> list[float]:
    """One weight per expert, 1 by default.

    Raises:
        ValueError: unknown names, negative weights, or only zeros.
    """
    own = dict(given or {})
    check_option("weights", own, Mapping[str, float], "[0, inf)")
    if unknown := [name for name in own if name not in names]:
        raise ValueError(f"weights: {listed(unknown)} are no experts; they are {listed(names, 12)}")
    weights = [float(own.get(name, 1.0)) for name in names]
    if not any(weights):
        raise ValueError("weights: every weight is 0")
    return weights


def rule_buffers(models: PlainModels, rule: BufferRule | None, weights: Sequence[float]) -> dict[str, Tensor]:
    """The buffers that differ from the base's by the rule; `reestimate` starts from the base's."""
    names, experts = models.compared.buffers, models.compared.experts
    if rule != "keep":  # what nobody chose for them is said
        kept = {None: names, "average": (), "reestimate": [n for n in names if not STATISTICS.search(n)]}
        warn_of_own_buffers(models.base, experts, kept[rule])
    if rule != "average":
        return {}
    found = average_buffers(models.base, list(experts.values()), names, weights)
    return {name: tensor.to(models.base[name].device) for name, tensor in found.items()}


def _coefficients(
    given: float | Mapping[str, float] | Coefficients, names: Sequence[str], vectors: TaskVectors
) -> Coefficients:
    """The coefficients as an object, checked against experts and parameters.

    Raises:
        ValueError: they are not finite, of other experts, or of other parameters.
    """
    if isinstance(given, Coefficients):
        known = {*given.layout.groups, *given.layout.excluded}
        other = sorted(given.layout.groups.keys() ^ (vectors.shapes.keys() - given.layout.excluded.keys()))
        if given.experts != tuple(names):
            raise ValueError(
                f"coefficients of {listed(given.experts, 12)}, and the experts are {listed(names, 12)}"
            )
        if other:
            raise ValueError(f"coefficients of other parameters: {listed(other)}, of {len(known)}")
        return given
    check_option("coefficients", given, float | Mapping[str, float])
    if isinstance(given, Mapping) and given.keys() != {*names}:
        raise ValueError(f"coefficients for {listed([*given], 12)}, and the experts are {listed(names, 12)}")
    values = [given[name] if isinstance(given, Mapping) else given for name in names]
    return Coefficients(names, Grouping("task").layout(vectors.shapes), torch.tensor(values)[:, None])
