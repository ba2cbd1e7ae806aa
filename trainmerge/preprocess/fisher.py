"""Fisher-weighted averaging: each weight is averaged by how much each expert's predictions depend on it.

Matena and Raffel, NeurIPS 2022 (arXiv 2111.09832).

Legend: `K` experts, `*S` parameter shape.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.base import Calibrator, Informed
from trainmerge.system.ranges import check_fields
from trainmerge.system.text import listed
from trainmerge.task_vectors.delta import TaskVectors
from trainmerge.task_vectors.square_norms import share_of


@dataclass(frozen=True)
class Fisher(Informed):
    """F_k tau_k / sum_j F_j, F_k the mean squared gradient of expert k's own predictions.

    Its merge is base + sum of the results, coefficient 1. Labels are drawn from the expert's predictions, one
    per example or position (the paper sums over all classes). Each F has norm 1 over all parameters and
    entries of at least `floor`, so that experts are averaged where no prediction depends on a weight.
    """

    floor: float = 1e-6

    def __post_init__(self) -> None:
        check_fields(self, floor="(0, inf)")

    @override
    def informed(self, task_vectors: TaskVectors, calibrator: Calibrator) -> Iterator[tuple[str, Tensor]]:
        weights = [
            calibrator.keep(unit_norm(squares(calibrator.gradients(k, sampled=True))))
            for k in range(len(task_vectors.experts))
        ]
        _name_flat(task_vectors, weights)
        for name, delta in task_vectors.deltas.items():
            taus = delta.dense()
            if name not in weights[0]:  # not merged
                yield name, taus / len(taus)
                continue
            shares = torch.stack([weight[name].to(taus).clamp_min(self.floor) for weight in weights])
            yield name, shares / shares.sum(dim=0) * taus


def _name_flat(task_vectors: TaskVectors, weights: Sequence[Mapping[str, Tensor]]) -> None:
    """One line on stderr about merged parameters without a gradient in any expert: they are averaged."""
    flat = [name for name in weights[0] if not any(bool(weight[name].any()) for weight in weights)]
    if flat:
        words = f"{len(flat)} parameters ({listed(flat)}; {share_of(task_vectors, flat)})"
        print(f"Fisher: no prediction depends on {words}: they are averaged", file=sys.stderr, flush=True)


def squares(gradients: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of the squared gradients, one model's size."""
    total: dict[str, Tensor] = {}
    for count, gradient in enumerate(gradients, start=1):
        for name, slope in gradient.items():
            square = slope.float().square()
            total[name] = square if count == 1 else total[name].mul_(1 - 1 / count).add_(square / count)
    return total


def unit_norm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with norm 1 over all of them; all-zero ones stay zero."""
    norm = sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))
    return {name: tensor / norm for name, tensor in tensors.items()} if norm else tensors
