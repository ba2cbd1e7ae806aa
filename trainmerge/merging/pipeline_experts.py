"""The experts of a diffusers pipeline: pipelines, single components and LoRAs of skills.

A LoRA's change is the product of its factors, which is what is averaged (SELMA, Li et al., arXiv 2403.06952).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from trainmerge.checkpoints.pipeline import Component, Pipeline, is_pipeline, open_pipeline
from trainmerge.checkpoints.skill import open_skill, skill_file
from trainmerge.kernels import LowRank, Term, Untouched
from trainmerge.merging.document import Document
from trainmerge.merging.open_merge import reference_of, same_folder
from trainmerge.task_vectors.delta import Delta, TaskVectors

Expert = Pipeline | Mapping[str, LowRank]


def open_experts(document: Document) -> tuple[Pipeline, dict[str, Expert]]:
    """The base, and each further model by its name in the document.

    Raises:
        ValueError: a model that is neither a folder of diffusers nor a LoRA, or does not fit the base.
    """
    reference = reference_of(document)
    base = open_pipeline(Path(reference))
    names = [name for name in document.merged if not same_folder(name, reference)]
    return base, {name: _expert(base, Path(name)) for name in names}


def _expert(base: Pipeline, path: Path) -> Expert:
    if (file := skill_file(path)) is not None:
        return open_skill(base, file)
    if not path.is_dir() or not is_pipeline(path):
        raise ValueError(
            f"{path}: neither a folder of diffusers (model_index.json, or a component's config.json) nor a "
            f"LoRA (.safetensors), as experts of {base.path.name} are"
        )
    found = open_pipeline(path)
    if found.single and not base.single:
        found = _as_part(base, found)
    _check(base, found)
    return found


def _as_part(base: Pipeline, alone: Pipeline) -> Pipeline:
    """A component given alone, under the name that the base has for its class."""
    kind = alone.components[""].config.get("_class_name")
    names = [name for name, part in base.components.items() if part.config.get("_class_name") == kind]
    if len(names) != 1:
        raise ValueError(
            f"{alone.path}: a {kind}, of which {base.path.name} has {len(names)}: give a pipeline"
        )
    return Pipeline(alone.path, {names[0]: alone.components[""]})


def _check(base: Pipeline, own: Pipeline) -> None:
    """Raise ValueError for other components, another function of the weights, or another prediction."""
    problems = [
        f"it has {name!r}, which the base lacks" for name in own.components if name not in base.components
    ]
    for name, part in own.components.items():
        if name in base.components:
            problems += [f"{name}: {line}" for line in base.components[name].differences(part)]
    kinds = [settings.get("prediction_type") for settings in (base.scheduler, own.scheduler)]
    if None not in kinds and kinds[0] != kinds[1]:
        problems.append(f"its scheduler predicts {kinds[1]}, the base's {kinds[0]}: their weights do not mix")
    if problems:
        raise ValueError(f"{own.path}: no expert of {base.path.name}:\n  " + "\n  ".join(problems))


def task_terms(base: Pipeline, experts: Mapping[str, Expert]) -> dict[str, tuple[Term, ...]]:
    """Full name of each tensor that some expert changed -> one term per expert, in order."""
    found: dict[str, dict[str, Term]] = {}
    for part in base.components.values():
        own = {
            name: expert.components[part.name].state
            for name, expert in experts.items()
            if isinstance(expert, Pipeline) and part.name in expert.components
        }
        for tensor, changed in _changed(part, own).items():
            found[base.full_name(part.name, tensor)] = changed
    for name, expert in experts.items():
        if not isinstance(expert, Pipeline):
            for tensor, change in expert.items():
                found.setdefault(tensor, {})[name] = change
    return {
        tensor: tuple(terms.get(name, Untouched()) for name in experts)
        for tensor in base.tensors
        if (terms := found.get(tensor))
    }


def _changed(part: Component, experts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Term]]:
    """A component's tensor -> the terms of experts that changed it."""
    if not experts:
        return {}
    try:
        vectors = TaskVectors.from_state_dicts(part.state, experts)
    except ValueError as error:
        raise ValueError(f"{part.path}: {error}") from error
    return {
        name: own for name, delta in vectors.deltas.items() if (own := _own_terms(delta, vectors.experts))
    }


def _own_terms(delta: Delta, names: Sequence[str]) -> dict[str, Term]:
    return {
        name: term
        for name, term in zip(names, delta.terms, strict=True)
        if not _equal(term.weight, delta.base)  # type: ignore[union-attr]
    }


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and bool((one == other).all())
