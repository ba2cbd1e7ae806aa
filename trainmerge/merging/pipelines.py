"""A merge of diffusers pipelines: every component with weights as a plain state dict, the rest copied.

Fine-tuned pipelines, single components and LoRAs of skills (SELMA, Li et al., arXiv 2403.06952) are experts
of one base; a LoRA's change is the product of its factors, which is what is averaged.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from trainmerge.checkpoints.pipeline import Component, Pipeline
from trainmerge.export.form import DtypeName, Form, divided
from trainmerge.merging.document import Document
from trainmerge.merging.group import OWN, Group
from trainmerge.merging.merged_tensors import MergedTensors
from trainmerge.merging.open_merge import as_vector, method_settings
from trainmerge.merging.pipeline_experts import open_experts, task_terms
from trainmerge.merging.values import parameter_places
from trainmerge.system.safetensors_file import read_ahead
from trainmerge.task_vectors.delta import Delta


@dataclass(frozen=True)
class PipelineMerge(MergedTensors[Pipeline]):
    """The tensors of a merged pipeline, under full names such as `unet/conv_in.weight`."""

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
