"""RegMean: each linear layer's least-squares fit to all experts' outputs on their own inputs.

Jin et al., ICLR 2023 (arXiv 2212.09849); RegMean++ (arXiv 2508.03121).

Legend: `K` experts, `m x n` a weight (outputs x inputs), `G` [n, n] second moment of a layer's inputs.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.base import Calibrator, Informed
from trainmerge.preprocess.spectrum import wide_rows
from trainmerge.system.ranges import check_fields
from trainmerge.system.text import listed
from trainmerge.task_vectors.delta import Delta, TaskVectors
from trainmerge.task_vectors.parameter_names import block_of
from trainmerge.task_vectors.portions import MOMENTS, portions
from trainmerge.task_vectors.roles import LINEAR, each_matrix
from trainmerge.task_vectors.square_norms import share_of

RIDGE = 1e-6  # of the mean diagonal: a direction that no expert reads keeps the base


@dataclass(frozen=True)
class RegMean(Informed):
    """tau_k G_k (sum_j G_j)^-1, G_k of expert k's layer inputs on its own unlabeled examples.

    Its merge is base + sum of the results, coefficient 1: of all weights W the one with the least
    sum_k |(W - W_k) X_k|^2. Padding is excluded. Parameters other than weights of linear layers are divided
    by K. The reference inverts without a ridge, and includes padding. Experts run once per GiB of their
    layers' second moments.

    Args:
        shrink: Factor of G's off-diagonal entries; 0.9 in the paper, less for few examples.
        sequential: RegMean++: a block's inputs come from the merged blocks before it. Runs each expert once
            per block.
    """

    shrink: float = 0.9
    sequential: bool = False
    otherwise: ClassVar[str] = "divided by K"

    def __post_init__(self) -> None:
        check_fields(self, shrink="[0, 1]")

    @override
    def informed(self, task_vectors: TaskVectors, calibrator: Calibrator) -> Iterator[tuple[str, Tensor]]:
        if self.sequential:
            results = self._block_by_block(task_vectors, calibrator)
            yield from ((name, results[name]) for name in task_vectors.deltas)
            return
        unseen: list[str] = []
        for names in portions(task_vectors, MOMENTS):
            grams = _grams(task_vectors, calibrator, names, {})
            for name in names:
                yield name, self._result(task_vectors, name, grams)
            unseen += self._unseen(task_vectors, names, grams)
        _warn_of_unseen(task_vectors, unseen)

    @override
    def applies_to(self, name: str, delta: Delta) -> bool:
        return delta.matrices > 0 and delta.role in (*LINEAR, "")

    def _unseen(
        self, task_vectors: TaskVectors, names: Sequence[str], grams: Sequence[Mapping[str, Tensor]]
    ) -> list[str]:
        """Weights of linear layers without a second moment of some expert's inputs."""
        deltas = task_vectors.deltas
        linear = [name for name in names if deltas[name].matrices and deltas[name].role in LINEAR]
        return [name for name in linear if any(name not in gram for gram in grams)]

    def _block_by_block(self, task_vectors: TaskVectors, calibrator: Calibrator) -> dict[str, Tensor]:
        blocks: dict[str, list[str]] = {}
        for name in calibrator.in_order(task_vectors.deltas):
            blocks.setdefault(block_of(name), []).append(name)
        results: dict[str, Tensor] = {}
        merged: dict[str, Tensor] = {}
        unseen: list[str] = []
        for names in blocks.values():
            grams = _grams(task_vectors, calibrator, names, merged)
            unseen += self._unseen(task_vectors, names, grams)
            results |= calibrator.keep({name: self._result(task_vectors, name, grams) for name in names})
            merged |= calibrator.keep(
                {name: task_vectors.deltas[name].base + results[name].sum(dim=0) for name in names}
            )
        _warn_of_unseen(task_vectors, unseen)
        return results

    def _result(self, task_vectors: TaskVectors, name: str, grams: Sequence[Mapping[str, Tensor]]) -> Tensor:
        taus = task_vectors.deltas[name].dense()
        if any(name not in gram for gram in grams):
            return taus / len(taus)
        moments = [self._shrunk(gram[name].double()) for gram in grams]
        total = torch.stack(moments).sum(dim=0)
        total.diagonal().add_(RIDGE * total.diagonal().mean().clamp_min(torch.finfo(total.dtype).tiny))
        factor = torch.linalg.cholesky(total)

        def fitted(taus: Tensor) -> Tensor:
            pairs = zip(taus, moments, strict=True)
            return torch.stack([_weighed(tau, moment, factor) for tau, moment in pairs])

        return each_matrix(taus, task_vectors.deltas[name].role, fitted)

    def _shrunk(self, gram: Tensor) -> Tensor:
        return self.shrink * gram + (1 - self.shrink) * torch.diag(gram.diagonal())


def _warn_of_unseen(task_vectors: TaskVectors, unseen: Sequence[str]) -> None:
    """Say which linear layers are averaged for want of inputs, and how much of the task vectors they are."""
    if unseen:
        warnings.warn(
            f"RegMean: the inputs of {len(unseen)} linear layers cannot be read ({listed(unseen)}): experts "
            "in one tensor, layers that no example reaches, or weights read without their layer. They are "
            f"divided by K: {share_of(task_vectors, unseen)}. Tsv and OptMerge need no inputs",
            stacklevel=2,
        )


def _weighed(tau: Tensor, moment: Tensor, factor: Tensor) -> Tensor:
    """tau G total^-1, some rows after the others; total = factor factor^T."""
    blocks = (torch.cholesky_solve((rows @ moment).T, factor).T for rows in wide_rows(tau))
    return torch.cat([block.to(tau.dtype) for block in blocks])


def _grams(
    task_vectors: TaskVectors, calibrator: Calibrator, names: Sequence[str], merged: Mapping[str, Tensor]
) -> list[dict[str, Tensor]]:
    experts = range(len(task_vectors.experts))
    return [calibrator.keep(calibrator.grams(expert, names, merged)) for expert in experts]
