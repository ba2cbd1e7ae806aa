"""WIDEN: weight every column of an expert by the changes of its norm and its direction.

Yu et al., 2024 (arXiv 2408.03092).

Legend: `K` experts, `m x n` a matrix (outputs x inputs).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.base import Preprocess
from trainmerge.system.ranges import check_fields
from trainmerge.task_vectors.delta import TaskVectors
from trainmerge.task_vectors.parameter_names import matches
from trainmerge.task_vectors.roles import Role, each_matrix


@dataclass(frozen=True)
class Widen(Preprocess):
    """tau_k times one weight per column; its merge is base + sum of the results, coefficient 1.

    A column's changes of norm and of direction are ranked within the expert; its weight is the softmax of the
    ranks over the experts, or `important` where the rank is above `above` times the mean. (So two equal
    experts give more than one of them: the paper's method.) Norms, biases and other parameters that are not
    matrices are weighted per entry in the same way, by |tau| in place of the ranks.

    Args:
        above: Ranks over this multiple of their mean get the weight `important`; infinity leaves the softmax.
        important: That weight.
        transposed: fnmatch patterns of matrices whose rows are inputs, besides embeddings and Conv1D layers.
    """

    above: float = 1.0
    important: float = 1.0
    transposed: Sequence[str] = ("*embed_tokens*", "*word_embeddings*")

    def __post_init__(self) -> None:
        check_fields(self, above="[0, inf]", important="[0, inf)")

    @override
    def __call__(self, task_vectors: TaskVectors) -> Iterator[tuple[str, Tensor]]:
        for name, delta in task_vectors.deltas.items():
            taus = delta.dense()
            if not delta.matrices:
                yield name, taus * self._scores(taus.abs().reshape(len(taus), -1)).view(taus.shape)
                continue
            flip = delta.role in ("transposed", "embedding") or matches(name, self.transposed)
            role: Role = "transposed" if flip else "linear"
            models = torch.cat([delta.base.to(taus)[None], taus])
            yield name, each_matrix(models, role, lambda both: self._weighted(both[0], both[1:]))

    def _weighted(self, base: Tensor, taus: Tensor) -> Tensor:
        """One matrix's results, [K, m, n]."""
        return taus * self._columns(base, taus)[:, None, :]

    def _columns(self, base: Tensor, taus: Tensor) -> Tensor:
        """One weight per column, [K, n]."""
        moves = [_changes(base, base + tau) for tau in taus]
        lengths, turned = (torch.stack(part) for part in zip(*moves, strict=True))
        return (self._scores(_ranks(lengths)) + self._scores(_ranks(turned))) / 2

    def _scores(self, sizes: Tensor) -> Tensor:
        """[K, n] ranks or changes -> [K, n] weights."""
        important = sizes > self.above * sizes.mean(dim=1, keepdim=True)
        return torch.where(important, self.important, sizes.softmax(dim=0))


def _ranks(changes: Tensor) -> Tensor:
    """Each change's rank within its expert, [K, n], in [0, 1)."""
    return changes.argsort(dim=1, stable=True).argsort(dim=1).to(changes) / changes.shape[1]


def _changes(base: Tensor, model: Tensor) -> tuple[Tensor, Tensor]:
    """Changes of every column's norm and direction, [n] each."""
    turned = 1 - torch.cosine_similarity(model, base, dim=0)
    return (model.norm(dim=0) - base.norm(dim=0)).abs(), turned
