"""The Karcher mean: the point of the sphere that is nearest to all experts.

Karcher, 1977; mergekit's `karcher` takes it of the models' weights.

Legend: `K` experts, `*S` parameter shape.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.base import Preprocess
from trainmerge.system.ranges import check_fields
from trainmerge.task_vectors.delta import TaskVectors
from trainmerge.task_vectors.sphere import karcher_mean


@dataclass(frozen=True)
class Karcher(Preprocess):
    """c_k tau_k: base + sum of them, coefficient 1, is the Karcher mean of each parameter's task vectors.

    The mean has the least sum of squared angles to the experts, and the mean of their norms; of two experts
    it is SLERP's midpoint, if their norms are equal. Of `weights` it is the mean of the models themselves:
    the difference of circle and straight line is then split equally between the results.

    Args:
        of: `task_vectors`, or `weights` as mergekit has it.
        steps: The most steps.
        tolerance: Stop when a step is shorter, in radians.
    """

    of: Literal["task_vectors", "weights"] = "task_vectors"
    steps: int = 10
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        check_fields(self, steps="[1, inf)", tolerance="[0, inf)")

    @override
    def __call__(self, task_vectors: TaskVectors) -> Iterator[tuple[str, Tensor]]:
        for name, delta in task_vectors.deltas.items():
            taus = delta.dense()
            base = delta.base.to(taus)
            wide = (taus if self.of == "task_vectors" else base + taus).double().reshape(len(taus), -1)
            shares = karcher_mean(wide @ wide.T, self.steps, self.tolerance)
            results = shares.to(taus).view(-1, *[1] * base.dim()) * taus
            if self.of == "weights":
                results += (float(shares.sum()) - 1) * base / len(taus)
            yield name, results
