"""Alignment of the merge with each expert on that expert's own examples (Expert Merging).

Legend: `B` examples, `T` tokens, `D` hidden size, `P` counted positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.data.batch import Asks, Batch, Outputs
from trainmerge.objectives.base import Objective
from trainmerge.objectives.rows import example_mean, expert_divergence
from trainmerge.system.ranges import check_fields

Distance = Literal["squared", "mse", "normalised", "cosine"]


@dataclass(frozen=True)
class Alignment(Objective):
    """logits * T^2 KL(expert || merge) + hidden * distance(hidden states), averaged over unmasked positions.

    The output term of a regression is |v - v_k|^2, the squared distance of its numbers.

    Expert Merging (arXiv 2509.25712), its L_logit and L_hid. Task weights are `Expert.weight`, the paper's
    beta_k. The reference code minimises the cross-entropy instead of the KL divergence: same gradient, other
    value; here the loss is 0 at the expert's own weights. It also averages `mse` over the layers where the
    paper sums `squared` over them: here layers are averaged, so multiply `hidden` by their number. And it
    averages the tasks' losses where the paper and a fit sum them: see `Anchor`.

    Args:
        logits: Weight of the output term; 0 disables it.
        temperature: T, of both softmaxes.
        hidden: Weight of the hidden-state term; 0 disables it.
        layers: Which hidden states, by transformers' index: 0 the embeddings, 1 the first block's output, -1
            the last, after the final norm.
        distance: `squared` |h - h_k|^2 as in the paper; `mse` the same over D, as in the reference code;
            `normalised` |h - h_k|^2 / |h_k|^2, which no layer's scale dominates; `cosine` 1 - cos.
        record: Dtype of the experts' recorded hidden states. With `bfloat16` an expert's own hidden term is
            its rounding (1e-6 to 3e-6 of |h|^2) instead of 0, which is noise near an expert; `float32` is
            exact, and its file is twice as large.
    """

    logits: float = 1.0
    temperature: float = 1.0
    hidden: float = 0.0
    layers: Sequence[int] = (-1,)
    distance: Distance = "normalised"
    record: Literal["bfloat16", "float32"] = field(default="bfloat16", metadata={"added": "0.2.0"})

    def __post_init__(self) -> None:
        check_fields(self, logits="[0, inf)", hidden="[0, inf)", temperature="(0, inf)")
        if not (self.logits or self.hidden):
            raise ValueError("Alignment needs logits or hidden above 0")
        if self.hidden and not self.layers:
            raise ValueError("Alignment.hidden is set: name at least one of the layers")

    @property
    @override
    def asks(self) -> Asks:
        return Asks(
            self.temperature if self.logits else None,
            tuple(dict.fromkeys(self.layers)) if self.hidden else (),
            torch.float32 if self.hidden and self.record == "float32" else torch.bfloat16,
        )

    @property
    @override
    def needs_logits(self) -> bool:
        return bool(self.logits)

    @override
    def __call__(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Loss per example, [B]."""
        terms = [self.hidden * loss for loss in self._hidden(outputs, batch)]
        if self.logits:
            terms.append(self._output(outputs, batch))
        return torch.stack(terms).sum(dim=0)

    def _output(self, outputs: Outputs, batch: Batch) -> Tensor:
        if outputs.kind == "values":
            return self.logits * _squared_distance(outputs.logits, batch)
        return self.logits * self.temperature**2 * expert_divergence(outputs, batch, self.temperature)

    def _hidden(self, outputs: Outputs, batch: Batch) -> list[Tensor]:
        """One [B] per layer, each divided by the number of layers."""
        assert batch.teacher is not None
        layers = self.asks.layers
        return [
            example_mean(self._apart(outputs.hidden[i][batch.mask], batch.teacher.hidden[i]), batch.mask)
            / len(layers)
            for i in layers
        ]

    def _apart(self, merged: Tensor, expert: Tensor) -> Tensor:
        """Distance of each position, [P, D], [P, D] -> [P], in float32 or wider."""
        merged = merged.to(torch.promote_types(merged.dtype, torch.float32))
        expert = expert.to(merged.dtype)
        if self.distance == "cosine":
            return 1 - torch.nn.functional.cosine_similarity(merged, expert, dim=-1)
        squared = (merged - expert).square().sum(dim=-1)
        if self.distance == "mse":
            return squared / merged.shape[-1]
        if self.distance == "normalised":
            return squared / expert.square().sum(dim=-1).clamp_min(torch.finfo(expert.dtype).tiny)
        return squared


def _squared_distance(values: Tensor, batch: Batch) -> Tensor:
    """|v - v_k|^2 of a regression's numbers [B, V] -> [B]."""
    if batch.teacher is None or batch.teacher.values is None:
        raise ValueError("the batch has no recorded expert values: record the experts first")
    told = batch.teacher.values.to(torch.promote_types(values.dtype, torch.float32))
    return (values.to(told.dtype) - told).square().sum(dim=-1)
