"""Merges based on the angle between models or task vectors: SLERP and Model Stock.

Legend: `K` experts, `*S` parameter shape.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.base import Preprocess
from trainmerge.system.ranges import check_fields
from trainmerge.task_vectors.delta import TaskVectors

PARALLEL = 1e-4  # radians: below, the great circle is the straight line


@dataclass(frozen=True)
class Slerp(Preprocess):
    """Two models' weights along the great circle between them, each parameter by its own angle.

    W = (sin((1 - t) a) W_1 + sin(t a) W_2) / sin(a), a the angle between W_1 and W_2 (Shoemake, 1985). The
    difference between circle and straight line is split between both results, so that base + sum of the
    results, coefficient 1, is W. Parallel and opposite weights are interpolated linearly.

    Of `task_vectors` it is the circle between the two task vectors, mergekit's NuSLERP with a base model.

    Args:
        t: 0 is the first expert, 1 the second.
        of: `weights` or `task_vectors`.
    """

    t: float = 0.5
    of: Literal["weights", "task_vectors"] = field(default="weights", metadata={"added": "0.2.0"})

    def __post_init__(self) -> None:
        check_fields(self, t="[0, 1]")

    @override
    def __call__(self, task_vectors: TaskVectors) -> Iterator[tuple[str, Tensor]]:
        if len(task_vectors.experts) != 2:
            raise ValueError(f"Slerp merges two experts, not {len(task_vectors.experts)}")
        for name, delta in task_vectors.deltas.items():
            taus = delta.dense()
            if self.of == "task_vectors":
                yield name, torch.stack([s * tau for s, tau in zip(self._shares(*taus), taus, strict=True)])
                continue
            base = delta.base.to(taus)
            shares = self._shares(*(base + taus))
            off_line = (sum(shares) - 1) * base / 2
            yield name, torch.stack([s * tau + off_line for s, tau in zip(shares, taus, strict=True)])

    def _shares(self, first: Tensor, second: Tensor) -> tuple[float, float]:
        angle = _angle(first, second)
        sine = torch.sin(angle)
        if not bool(sine > PARALLEL):
            return 1 - self.t, self.t
        return (
            float(torch.sin((1 - self.t) * angle) / sine),
            float(torch.sin(self.t * angle) / sine),
        )


@dataclass(frozen=True)
class ModelStock(Preprocess):
    """The experts' mean, shrunk towards the base as their cosine falls: K cos / (1 + (K - 1) cos) tau_k / K.

    Jang et al., ECCV 2024 (arXiv 2403.19522), for experts trained in the same way: cos is the mean cosine
    between their task vectors, per parameter; a negative one gives the base. Its merge is base + sum of the
    results, coefficient 1.
    """

    @override
    def __call__(self, task_vectors: TaskVectors) -> Iterator[tuple[str, Tensor]]:
        if len(task_vectors.experts) < 2:
            raise ValueError("ModelStock needs at least two experts")
        for name, delta in task_vectors.deltas.items():
            taus = delta.dense()
            cosines = [torch.cos(_angle(a, b)) for a, b in combinations(taus, 2)]
            cosine = torch.stack(cosines).mean().clamp_min(0)
            yield name, cosine / (1 + (len(taus) - 1) * cosine) * taus


def _angle(first: Tensor, second: Tensor) -> Tensor:
    """The angle between two tensors as vectors, float64; a right angle if one is zero."""
    a, b = first.double().flatten(), second.double().flatten()
    norms = a.norm() * b.norm()
    if not bool(norms > 0):
        return torch.tensor(torch.pi / 2, dtype=torch.float64)
    return torch.acos((torch.dot(a, b) / norms).clamp(-1, 1))
