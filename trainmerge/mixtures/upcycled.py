"""Dense experts -> the tensors of one mixture: their feed-forward networks are its experts.

All other tensors are the run's merge. With a shared expert, whose gate is 0 and so lets one half through, the
shared one is the merge's network times 2 (1 - routed), and the experts are their own times `routed`; both
factors are in the last matrix. So a mixture of equal experts is the dense model, whatever the router does.

Legend: `N` experts, `H` hidden size.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trainmerge.checkpoints import Checkpoint
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.layout import Grouping
from trainmerge.export.form import SHARD, Form, divided
from trainmerge.export.shards import CheckpointMerge
from trainmerge.export.tensors import OnlyModel
from trainmerge.mixtures.families import Mixture, feed_forward
from trainmerge.system.safetensors_file import TensorInfo
from trainmerge.task_vectors.delta import TaskVectors


@dataclass(frozen=True)
class Part:
    """One tensor of the mixture: a tensor of the merge, or of one expert, times a factor."""

    source: str
    expert: int | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class Upcycled(OnlyModel):
    """The tensors of the mixture.

    Args:
        merge: The run's merge.
        originals: The experts' own task vectors.
        mixture: The family of the result.
        routers: Layer -> its router [N, H].
        routed: The share of the routed experts, of a family with a shared one.
    """

    merge: CheckpointMerge
    originals: TaskVectors
    mixture: Mixture
    routers: Mapping[str, Tensor]
    routed: float = 0.5

    @property
    def base(self) -> Checkpoint:
        """The base of the merge, whose side files the mixture has."""
        return self.merge.base

    @property
    def form(self) -> Form:
        """The dtype."""
        return self.merge.form

    @cached_property
    def parts(self) -> Mapping[str, Part]:
        """The tensors that come from others; the rest are routers and gates."""
        found, dense = {}, feed_forward(self.merge.tensors)
        for name in self.merge.tensors:
            if name not in dense:
                found[name] = Part(name)
                continue
            layer, kind = dense[name]
            last, shared = kind == "down_proj", self.mixture.shared
            factor = self.routed if last and shared else 1.0
            for number in range(len(self.originals.experts)):
                found[self.mixture.expert(layer, number, kind)] = Part(name, number, factor)
            if shared:
                factor = 2 * (1 - self.routed) if last else 1.0
                found[f"{layer}.{self.mixture.block}.shared_expert.{kind}.weight"] = Part(name, None, factor)
        return found

    @cached_property
    def made(self) -> Mapping[str, Tensor]:
        """Routers [N, H], and gates [1, H] of shared experts, which are 0."""
        found = {}
        inside = {layer: name for name, (layer, _) in feed_forward(self.merge.tensors).items()}
        for layer, rows in self.routers.items():
            dtype = self.merge.tensors[inside[layer]].dtype
            found[self.mixture.router(layer)] = rows.to(dtype)
            if self.mixture.shared:
                gate = torch.zeros(1, rows.shape[1], dtype=dtype)
                found[f"{layer}.{self.mixture.block}.shared_expert_gate.weight"] = gate
        return found

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The headers, routers last."""
        from_others = {name: self.merge.tensors[part.source] for name, part in self.parts.items()}
        own = {name: TensorInfo(t.dtype, t.shape, self.base.path) for name, t in self.made.items()}
        return from_others | own

    @cached_property
    def shards(self) -> Mapping[str, tuple[str, ...]]:
        """File name -> its tensors; routers are in the last ones, which are written again if they change."""
        sizes = {name: info.nbytes for name, info in self.tensors.items()}
        return divided(sizes, self.form.shard_size or SHARD)

    def merged(self, name: str) -> bool:
        """Whether a tensor is the run's merge."""
        part = self.parts.get(name)
        return part is not None and part.expert is None and self.merge.merged(part.source)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor, as consecutive pieces of rows."""
        if name in self.made:
            yield self.made[name].contiguous()
            return
        part = self.parts[name]
        source = self.merge if part.expert is None else self._experts[part.expert]
        for piece in source.pieces(part.source):
            yield piece if part.factor == 1 else (piece.float() * part.factor).to(piece.dtype)

    def read_ahead_of(self, name: str) -> None:
        """Ask the kernel to read ahead the pages that `pieces` will need."""
        if name in self.parts:
            part = self.parts[name]
            (self.merge if part.expert is None else self._experts[part.expert]).read_ahead_of(part.source)

    @cached_property
    def _experts(self) -> list[CheckpointMerge]:
        """Every expert as a one-hot merge."""
        experts = self.originals.experts
        layout = Grouping(granularity="task").layout(self.originals.shapes)
        return [
            CheckpointMerge(
                self.base, self.originals, Coefficients(experts, layout, one[:, None]), None, self.form
            )
            for one in torch.eye(len(experts))
        ]
