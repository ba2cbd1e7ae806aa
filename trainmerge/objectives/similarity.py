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
        pooling: `modules` embeds as modules.json of the base says, through its pooling, Dense and Normalize
            modules. `mean`, `first` and `last` (token) pool the last hidden states of a base without that
            file.
    """

    embedding: float = 0.0
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
        loss = _pairs(merged, expert, counted=batch.share > 0)
        if self.embedding:
            loss = loss + self.embedding * (merged - expert).square().sum(dim=-1)
        return loss


def _pairs(merged: Tensor, expert: Tensor, counted: bool) -> Tensor:
    """Mean squared difference of each row's cosines with the others', [R, E], [R, E] -> [R].

    The rows of other processes are constants here, whose own gradient is that process's: a pair counts in the
    row of either side, so its slope counts twice. `counted` is False if these rows repeat another process's.
    """
    itself = torch.eye(len(merged), device=merged.device)
    apart = ((merged @ merged.T - expert @ expert.T).square() * (1 - itself)).sum(dim=-1)
    others = _others(merged, expert, counted)
    count = len(merged) - 1 + sum(len(rows) for rows, _ in others)
    for rows, of_expert in others:
        across = (merged @ rows.T - expert @ of_expert.T).square().sum(dim=-1)
        apart = apart + 2 * across - across.detach()
    return apart / max(count, 1)


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
