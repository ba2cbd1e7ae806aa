"""A merge of diffusers pipelines: every component with weights as a plain state dict, the rest copied.

Fine-tuned pipelines, single components and LoRAs of skills (SELMA, Li et al., arXiv 2403.06952) are experts
of one base; a LoRA's change is the product of its factors, which is what is averaged.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from trainmerge.checkpoints.pipeline import Component, Pipeline, is_pipeline, open_pipeline
from trainmerge.checkpoints.skill import open_skill, skill_file
from trainmerge.export.form import DtypeName, Form, divided
from trainmerge.export.shards import finite
from trainmerge.kernels import LowRank, Term, Untouched
from trainmerge.merging.document import Document
from trainmerge.merging.group import OWN, Group
from trainmerge.merging.open_merge import as_vector, merged_pieces, method_settings, reference_of, same_folder
from trainmerge.merging.values import parameter_places
from trainmerge.system.safetensors_file import TensorInfo, read_ahead
from trainmerge.task_vectors.delta import Delta, TaskVectors

Expert = Pipeline | Mapping[str, LowRank]


@dataclass(frozen=True)
class PipelineMerge:
    """The tensors of a merged pipeline, under full names such as `unet/conv_in.weight`."""

    base: Pipeline
    form: Form
    document: Document
    groups: Mapping[str, Group]
    faithful: bool

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Their headers."""
        return self.form.headers(self.base.tensors)

    @cached_property
    def shards(self) -> Mapping[str, tuple[str, ...]]:
        """File in the folder -> its tensors."""
        full = self.base.full_name
        return {
            full(part.name, file): tuple(full(part.name, name) for name in names)
            for part in self.base.components.values()
            for file, names in self.files_of(part).items()
        }

    @property
    def after(self) -> Mapping[str, tuple[str, ...]]:
        """None: all components are in `shards`."""
        return {}

    def files_of(self, part: Component) -> Mapping[str, tuple[str, ...]]:
        """A component's weight files -> its tensors."""
        if self.form.shard_size is None:
            return part.shards
        sizes = {name: self.form.size_of(info) for name, info in part.tensors.items()}
        made = divided(sizes, self.form.shard_size)
        return {file.replace("model", part.stem, 1): names for file, names in made.items()}

    def in_file(self, name: str) -> str:
        """A tensor's name in its component's file."""
        return self.base.split(name)[1]

    def merged(self, name: str) -> bool:
        """Whether some expert changed a tensor; others are copies."""
        return name in self.groups

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor as consecutive pieces of rows.

        Raises:
            ValueError: a merged number is not finite.
        """
        info = self.base.tensors[name]
        dtype = self.form.dtype_of(info)
        if name not in self.groups:
            yield finite(name, self.base.read(name).to(dtype), info.dtype)
            return
        group = self.groups[name]
        rule = self.document.definition.rule(group, self.faithful)
        yield from merged_pieces(name, group, rule, dtype, info.shape)

    def read_ahead_of(self, name: str) -> None:
        """Ask the kernel to read ahead the pages that `pieces` will need."""
        read_ahead(self.base.read(name))


def open_pipelines(
    document: Document, faithful: bool, dtype: DtypeName | None, shard_size: str | None
) -> PipelineMerge:
    """Check all headers of a merge of pipelines; weights are read where they are compared with the base's.

    Raises:
        ValueError: experts of another architecture or schedule, or LoRAs of another base.
    """
    base, experts = open_experts(document)
    merged = document.merged
    order = tuple(list(experts).index(name) if name in experts else OWN for name in merged)
    terms = task_terms(base, experts)
    shared, each = method_settings(document)
    located = parameter_places(list(base.tensors))
    groups = {
        name: Group(
            as_vector(Delta(base.read(name), own)), order, tuple(merged), document.based, located[name],
            shared, each,
        )
        for name, own in terms.items()
    }  # fmt: skip
    chosen = dtype or document.out_dtype or document.dtype
    return PipelineMerge(base, Form(chosen, shard_size), document, groups, faithful)  # type: ignore[arg-type]


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
