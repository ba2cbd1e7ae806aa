"""One task's checkpoint: the expert's own class, with the merged weights and its own head.

`AutoModelFor...from_pretrained` loads it like the expert: labels and settings are the expert's, tokenizer and
other side files the base's, as in every export.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainmerge.checkpoints.whole import export_manifest
from trainmerge.export.form import write_settings
from trainmerge.export.shards import CheckpointMerge, write_shard
from trainmerge.export.side_files import copy_base_files
from trainmerge.export.tensors import OnlyModel
from trainmerge.run.opened import Opened
from trainmerge.run.recipe import Recipe
from trainmerge.system.disk_space import check_free_space
from trainmerge.system.json_file import read_json
from trainmerge.system.safetensors_file import TensorInfo, read_ahead

if TYPE_CHECKING:  # imports transformers, which an export without a task does not need
    from trainmerge.checkpoints import OwnHead

FILE = "model.safetensors"
REMEDY = "Download or save it again."
ALIKE = ("vocab_size", "dtype", "torch_dtype")  # keys of config.json that describe the merged weights


@dataclass(frozen=True)
class TaskMerge(OnlyModel):
    """The tensors of a task's checkpoint, by the names of its class."""

    merge: CheckpointMerge
    head: "OwnHead"
    own: Mapping[str, Tensor]  # in the dtype of the base

    @classmethod
    def of(cls, merge: CheckpointMerge, head: "OwnHead") -> "TaskMerge":
        """The checkpoint of an expert's head; its own tensors are cast as in memory, to the base's dtype."""
        shared = (merge.base.tensors[name].dtype for name in head.shared.values())
        dtype = next(kind for kind in shared if kind.is_floating_point)
        own = {name: t.to(dtype) if t.is_floating_point() else t for name, t in head.tensors()}
        return cls(merge, head, own)

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The headers of all tensors."""
        known = self.merge.tensors
        own = {name: TensorInfo(t.dtype, t.shape, self.head.folder) for name, t in self.own.items()}
        return {name: known[base] for name, base in self.head.shared.items()} | own

    @property
    def shards(self) -> Mapping[str, tuple[str, ...]]:
        """One file."""
        return {FILE: tuple(self.tensors)}

    def merged(self, name: str) -> bool:
        """Whether a tensor is merged; others are the expert's or the base's."""
        return name in self.head.shared and self.merge.merged(self.head.shared[name])

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor after the merge, as consecutive pieces of rows."""
        if name in self.own:
            yield self.own[name].contiguous()
        else:
            yield from self.merge.pieces(self.head.shared[name])

    def read_ahead_of(self, name: str) -> None:
        """Ask the kernel to read ahead the pages that `pieces` will need."""
        if name in self.own:
            read_ahead(self.own[name])
        else:
            self.merge.read_ahead_of(self.head.shared[name])


def own_head(recipe: Recipe, opened: Opened, task: str) -> "OwnHead":
    """The own head of a task's expert.

    Raises:
        ValueError: no such expert, or it has none.
    """
    from trainmerge.checkpoints import OwnHead
    from trainmerge.run.heads import task_heads

    heads = task_heads(recipe, opened)
    if not isinstance(head := heads.get(task), OwnHead):
        able = [name for name, other in heads.items() if isinstance(other, OwnHead)]
        raise ValueError(
            f"task {task!r}: no expert of this name has a head of its own (those with one: "
            f"{', '.join(able) or 'none'}). Without a task the export has the base's class"
        )
    return head


def task_of(folder: Path) -> str | None:
    """The task whose checkpoint an export is; None for the base's class."""
    task = export_manifest(folder).get("task")
    return task if isinstance(task, str) else None


@torch.no_grad()
def write_task(merge: TaskMerge, folder: Path) -> dict[str, str]:
    """Write weights and side files into an empty folder; returns the weight file's SHA-256."""
    base = merge.merge.base
    sizes = (info.nbytes for info in merge.tensors.values())
    check_free_space(folder, sum(sizes))
    digest = write_shard(merge, merge.tensors, folder / FILE)
    base.check_unchanged()
    copy_base_files(base, folder)
    write_settings(folder, task_config(merge))
    return {FILE: digest}


def task_config(merge: TaskMerge) -> dict[str, Any]:
    """The expert's config.json, or an adapter's base's, for weights of the base's vocabulary and dtype."""
    head, ours = merge.head, merge.merge.base.config
    content = read_json(head.config_file, REMEDY)
    for key in ALIKE:
        if key in ours:
            content[key] = ours[key]
        elif key != "vocab_size":
            content.pop(key, None)
    content |= {
        "architectures": [head.kind.__name__],
        "id2label": {str(number): name for name, number in head.labels.items()},
        "label2id": head.labels,
    }
    return content
