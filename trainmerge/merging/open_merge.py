"""A document's merge over mapped files, one tensor at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from trainmerge.checkpoints import Checkpoint, Rules, find_chosen, open_checkpoint
from trainmerge.checkpoints.choice import BASE, UNION
from trainmerge.export.form import DtypeName, Form
from trainmerge.export.tensors import OnlyModel
from trainmerge.kernels import ExpertWeight, Untouched
from trainmerge.merging.document import Document
from trainmerge.merging.group import OWN, Alternatives, Group
from trainmerge.merging.merged_tensors import MergedTensors
from trainmerge.merging.values import parameter_places
from trainmerge.merging.vocabulary import choose_tokenizer
from trainmerge.system.safetensors_file import read_ahead
from trainmerge.task_vectors.delta import Delta, TaskVectors
from trainmerge.task_vectors.parameter_names import number_of


@dataclass(frozen=True)
class DocumentMerge(MergedTensors[Checkpoint], OnlyModel):
    """The tensors of a document's merge."""

    @cached_property
    def shards(self) -> Mapping[str, tuple[str, ...]]:
        """File name -> its tensors."""
        return self.form.shards(self.base)

    def group_of(self, name: str) -> Group | None:
        """The models' values of a tensor, or of the one that it is tied to; None for a copy."""
        return self.groups.get(self.base.tied.get(name, name))

    def read_ahead_of(self, name: str) -> None:
        """Ask the kernel to read ahead the pages that `pieces` will need."""
        read_ahead(self.base.read(name))
        group = self.group_of(name)
        for term in group.delta.terms if group else ():
            if isinstance(term, ExpertWeight):
                read_ahead(term.weight)


def open_merge(
    document: Document, scratch: Path, faithful: bool, dtype: DtypeName | None, shard_size: str | None
) -> DocumentMerge:
    """Check all headers and map the files; no weight is read, except those of unusual adapters."""
    merged = document.merged
    reference = reference_of(document)
    base = open_checkpoint(reference)
    others = [name for name in merged if not same_folder(name, reference)]
    sides = sides_of(document)
    folders = {sides[name]: Path(_expert_folder(name, reference)) for name in others}
    choice = choose_tokenizer(
        document.tokenizer, sides, {BASE: base.path, **folders}, equal=document.base is None
    )
    rules = Rules(workspace=scratch, shared_vocabulary=document.vocabulary == "shared")
    base, sources = find_chosen(base, folders, choice, rules)
    vectors = sources.open(base)
    order = tuple(others.index(name) if name in others else OWN for name in merged)
    located = parameter_places(list(sources.parameters))
    depth = 1 + max((block[1] for name in located if (block := number_of(name))), default=-1)
    if document.layers not in (None, depth):
        raise ValueError(
            f"slices: the layers end at {document.layers}, and {base.path} has {depth}; only slices over all "
            "layers are supported"
        )
    shared, each = method_settings(document)
    groups = {
        name: Group(
            _delta(vectors, base, name, len(others)), order, tuple(merged), document.based, located[name],
            shared, each,
        )
        for name in sources.parameters
    }  # fmt: skip
    chosen = dtype or document.out_dtype or document.dtype or _promoted(base, vectors)
    return DocumentMerge(base, Form(chosen, shard_size), document, groups, faithful)  # type: ignore[arg-type]


def method_settings(document: Document) -> tuple[dict[str, object], dict[str, tuple[object, ...]]]:
    """The settings of all models, and of each, with the values that count after them."""
    method, given = document.definition, document.parameters

    def values(key: str, default: object, *own: Mapping[str, Any]) -> Alternatives:
        found = [parameters[key] for parameters in (*own, given) if key in parameters]
        return Alternatives((*found, *([] if default is None else [default])))

    shared: dict[str, object] = {key: values(key, default) for key, default in method.shared.items()}
    each: dict[str, tuple[object, ...]] = {
        key: tuple(values(key, default, document.models.get(name, {})) for name in document.merged)
        for key, default in method.each.items()
    }
    return shared, each


def _delta(vectors: TaskVectors, base: Checkpoint, name: str, count: int) -> Delta:
    """A parameter's differences; one that no model changed has them too."""
    found = vectors.deltas.get(name)
    delta = found or Delta(base.read(name), tuple(Untouched() for _ in range(count)))
    return as_vector(delta)


def as_vector(delta: Delta) -> Delta:
    """A parameter's differences, with one entry in place of none in its shape."""
    if delta.base.dim():
        return delta
    terms = tuple(
        ExpertWeight(term.weight.view(1)) if isinstance(term, ExpertWeight) else term for term in delta.terms
    )
    return Delta(delta.base.view(1), terms, delta.role)


def _promoted(base: Checkpoint, vectors: TaskVectors) -> str | None:
    """The dtype that holds all models' numbers, at most the float32 of the sums; None if the base's."""
    own = {info.dtype for info in base.tensors.values() if info.dtype.is_floating_point}
    every = set(own)
    for delta in vectors.deltas.values():
        every |= {term.weight.dtype for term in delta.terms if isinstance(term, ExpertWeight)}
    if every == own:
        return None
    first, *rest = sorted(every, key=str)
    for dtype in rest:
        first = torch.promote_types(first, dtype)
    return str(torch.float32 if first == torch.float64 else first).removeprefix("torch.")


def reference_of(document: Document) -> str:
    """The checkpoint whose names, configuration and files the result has: the base model, or the first."""
    return (document.base or document.merged[0]).partition("+")[0]


def sides_of(document: Document) -> dict[str, str]:
    """Model, as the document names it -> `base`, for the reference checkpoint, or the expert's name."""
    reference, named = reference_of(document), [*filter(None, [document.base]), *document.models]
    return {
        name: BASE if same_folder(name, reference) else f"./{name}" if name in (BASE, UNION) else name
        for name in named
    }


def _expert_folder(name: str, reference: str) -> str:
    """The folder of a model; that of its adapter, of a model `MODEL+ADAPTER` on the reference checkpoint."""
    model, plus, adapter = name.partition("+")
    if not plus or Path(name).is_dir():
        return name
    if not same_folder(model, reference):
        raise ValueError(
            f"{name}: an adapter of another model than {reference}; merge it into its model first"
        )
    return adapter


def same_folder(first: str, second: str) -> bool:
    """Whether two paths are one folder."""
    return Path(first).resolve() == Path(second).resolve()
