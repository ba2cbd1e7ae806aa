"""AIM: change less where the base's activations are large.

Nobari et al., 2025 (arXiv 2502.02421).

Legend: `K` experts, `m x n` a weight (outputs x inputs).
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.base import Calibrator, Informed
from trainmerge.system.ranges import check_fields
from trainmerge.system.text import listed
from trainmerge.task_vectors.delta import Delta, TaskVectors
from trainmerge.task_vectors.roles import LINEAR, each_matrix
from trainmerge.task_vectors.square_norms import share_of


@dataclass(frozen=True)
class Aim(Informed):
    """tau_k diag(r), r_j = 1 - (1 - omega) a_j / max a, a_j the mean |x_j| of the inputs under the base.

    Of norms it scales the entries. It precedes or follows any method, whose coefficient it leaves as it is.
    Embeddings and biases stay; an output layer that is tied to an embedding is one. The inputs are those of
    all experts' calibration examples, without padding, where the paper has task-agnostic text; layers whose
    inputs cannot be read are left as they are, and a warning names them.

    Args:
        omega: Factor at the largest activation; 1 changes nothing. 0.4 in the paper.
    """

    omega: float = 0.4

    def __post_init__(self) -> None:
        check_fields(self, omega="[0, 1]")

    @override
    def informed(self, task_vectors: TaskVectors, calibrator: Calibrator) -> Iterator[tuple[str, Tensor]]:
        sizes = calibrator.magnitudes(list(task_vectors.deltas))
        for name, delta in task_vectors.deltas.items():
            taus = delta.dense()
            if name in sizes:
                factors = self.factors(sizes[name]).to(taus)
                taus = _scaled(taus, factors, delta)
            yield name, taus
        deltas = task_vectors.deltas
        unseen = [n for n, d in deltas.items() if n not in sizes and d.matrices and d.role in LINEAR]
        if unseen:
            warnings.warn(
                f"Aim: the inputs of {len(unseen)} linear layers cannot be read ({listed(unseen)}); they are "
                f"left as they are: {share_of(task_vectors, unseen)}",
                stacklevel=2,
            )

    @override
    def applies_to(self, name: str, delta: Delta) -> bool:
        return delta.role == "vector" or (delta.matrices > 0 and delta.role in (*LINEAR, ""))

    def factors(self, sizes: Tensor) -> Tensor:
        """Mean magnitudes of the inputs [n] -> r [n], in [omega, 1]."""
        largest = sizes.max()
        return 1 - (1 - self.omega) * sizes / torch.where(largest > 0, largest, 1.0)


def _scaled(taus: Tensor, factors: Tensor, delta: Delta) -> Tensor:
    """The columns of a matrix, or the entries of a norm."""
    return each_matrix(taus, delta.role, lambda own: own * factors) if delta.matrices else taus * factors
