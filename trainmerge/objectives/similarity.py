"""Similarity of the merge's sentence embeddings to each expert's, on that expert's own texts.

Legend: `B` examples of one expert, over all processes; `R` of this process; `E` width of an embedding.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize
from typing_extensions import override

from trainmerge.data.batch import Asks, Batch, Outputs
from trainmerge.objectives.base import Objective
from trainmerge.system import distributed
from trainmerge.system.ranges import check_fields

LEAST = 1e-6  # variance of the expert's cosines, whose rounding is far below
Embedded = Literal["modules", "mean", "first", "last"]


@dataclass(frozen=True)
class Similarity(Objective):
    """Mean over b' != b of (cos(e_b, e_b') - cos(e*_b, e*_b'))^2, with the expert's embeddings e*.

    The distillation of Gram matrices (Tung and Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019)
    with cosines, whose diagonal is 1 and left out; the mean over a batch is the mean squared difference of
    its pairs. It needs neither labels nor an output layer. The pairs are those of the whole step: several
    processes exchange their embeddings, so an example may be alone on its process. An example without any
    other has the loss 0.

    Args:
        embedding: Weight of |e / |e| - e* / |e*||^2, which is added: similarities alone leave the embeddings
            free to turn, so set it where the merge's embeddings are compared with the expert's own.
        relative: Compare the cosines up to their level, in units of the expert's spread: from the differences
            their mean over the pairs is subtracted, and the squares are divided by the variance of the
            expert's cosines. The order of similarities, which retrieval needs, does not depend on the level,
            and experts with different spreads weigh alike.
        pooling: `modules` embeds as modules.json of the base says, through its pooling, Dense and Normalize
            modules. `mean`, `first` and `last` (token) pool the last hidden states of a base without that
            file.
    """

    embedding: float = 0.0
    relative: bool = False
    pooling: Embedded = "modules"

    def __post_init__(self) -> None:
        check_fields(self, embedding="[0, inf)")

    @property
    @override
    def asks(self) -> Asks:
        return Asks(embedding=self.pooling)

    @property
    @override
    def needs_logits(self) -> bool:
        return False

    @property
    @override
    def couples(self) -> bool:
        return True

    @override
    def __call__(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Loss per example, [R].

        Raises:
            ValueError: the expert's embeddings were not recorded, or the merge has none.
        """
        if outputs.embedding is None or batch.teacher is None or batch.teacher.embedding is None:
            raise ValueError("the batch has no embeddings: record the experts first, and embed the merge")
        wide = torch.promote_types(outputs.embedding.dtype, torch.float32)
        merged = normalize(outputs.embedding.to(wide), dim=-1)
        expert = normalize(batch.teacher.embedding.to(wide), dim=-1)
        loss = _pairs(merged, expert, batch.share > 0, self.relative)
        if self.embedding:
            loss = loss + self.embedding * (merged - expert).square().sum(dim=-1)
        return loss


def _pairs(merged: Tensor, expert: Tensor, counted: bool, relative: bool) -> Tensor:
    """Mean squared difference of each row's cosines with the others', [R, E], [R, E] -> [R].

    The rows of other processes are constants here, whose own gradient is that process's: a pair counts in the
    row of either side, so its slope counts twice. `counted` is False if these rows repeat another process's.
    """
    itself = torch.eye(len(merged), device=merged.device)
    others = _others(merged, expert, counted)
    own = [(merged.detach(), expert)] if counted else []
    level, scale = merged.new_zeros(()), merged.new_ones(())
    if relative:
        level, scale = _level_and_scale([*own, *others])
    apart = ((merged @ merged.T - expert @ expert.T - level).square() * (1 - itself)).sum(dim=-1)
    count = len(merged) - 1 + sum(len(rows) for rows, _ in others)
    for rows, of_expert in others:
        across = (merged @ rows.T - expert @ of_expert.T - level).square().sum(dim=-1)
        apart = apart + 2 * across - across.detach()
    return apart / max(count, 1) / scale


def _level_and_scale(every: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The mean difference of the cosines of all pairs, and the variance of the expert's, at least 1e-6.

    Constants for the gradient: that of a mean square about the mean is the same with the mean held fixed.
    """
    merged, expert = (torch.cat(rows) for rows in zip(*every, strict=True))
    if len(merged) < 2:
        return merged.new_zeros(()), merged.new_ones(())
    pairs = ~torch.eye(len(merged), dtype=torch.bool, device=merged.device)
    wanted = (expert @ expert.T)[pairs]
    apart = (merged @ merged.T)[pairs] - wanted
    return apart.mean(), wanted.var(correction=0).clamp_min(LEAST)


def _others(merged: Tensor, expert: Tensor, counted: bool) -> list[tuple[Tensor, Tensor]]:
    """The embeddings of the other processes' examples, the merge's and the expert's."""
    if distributed.world_size() == 1:
        return []
    every = distributed.all_gather((merged.detach().cpu(), expert.cpu(), counted))
    return [
        (rows.to(merged), of_expert.to(merged))
        for rank, (rows, of_expert, real) in enumerate(every)
        if real and rank != distributed.rank()
    ]
