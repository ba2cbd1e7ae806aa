"""Routers of merged mixtures of experts, calibrated on unlabeled texts: HARC (arXiv 2606.03391), and ours.

Legend: `K` fine-tunes, `E` experts of a layer, `H` hidden size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.kernels import accumulation_dtype
from trainmerge.preprocess.base import Calibrator, Informed, Router
from trainmerge.preprocess.router_calibration import harc, least_divergence
from trainmerge.system.ranges import check_fields
from trainmerge.task_vectors.delta import Delta, TaskVectors


@dataclass(frozen=True)
class CalibratedRouters(Informed):
    """The routers' differences such that the merge sends tokens where each fine-tune would send its own.

    Layer by layer: the merge so far runs on the calibration texts of every fine-tune i; from the router's
    inputs x there and the fine-tune's own router W_i, with r_i(x) = softmax(W_i x), follows one router W for
    all. `kl`, ours, minimises sum_i E KL(r_i || softmax(W x)), which is convex. `harc` minimises its
    second-order expansion at the W_i (arXiv 2606.03391). Both begin at the merged router. All other task
    vectors are unchanged.

    Args:
        loss: What is minimised.
        scale: The coefficient of the merge, which is `model.initial`: the results are for this one.
        shrink: Factor of the off-diagonal entries of `harc`'s equations, 0.9 in its code.
    """

    loss: Literal["kl", "harc"] = "kl"
    scale: float = 1.0
    shrink: float = 0.9

    def __post_init__(self) -> None:
        check_fields(self, scale="(0, inf)", shrink="[0, 1]")

    @override
    def changes(self, task_vectors: TaskVectors, calibrator: Calibrator) -> list[str]:
        routers = calibrator.routers()
        if not routers:
            raise ValueError("CalibratedRouters: no fine-tune changes a router of the base, or it has none")
        names = {name for own in routers for name in own.tensors}
        return [name for name in task_vectors.deltas if name in names]

    @override
    def informed(self, task_vectors: TaskVectors, calibrator: Calibrator) -> Iterator[tuple[str, Tensor]]:
        found: dict[str, Tensor] = {}
        with calibrator.merge_of(task_vectors, self.scale):
            for router in calibrator.routers():
                rows = self._calibrated(router, task_vectors, calibrator)
                parts = {router.weight: rows[:, :-1] if router.bias else rows}
                if router.bias:
                    parts[router.bias] = rows[:, -1]
                for name, part in parts.items():
                    calibrator.write(name, part)
                    base = task_vectors.deltas[name].base
                    change = (part - base.to(part)) / (self.scale * len(task_vectors.experts))
                    found[name] = change.expand(len(task_vectors.experts), *change.shape)
        yield from ((name, found[name]) for name in self.changes(task_vectors, calibrator))

    def _calibrated(self, router: Router, task_vectors: TaskVectors, calibrator: Calibrator) -> Tensor:
        """The rows [E, H], with a last column of biases if the router has them."""
        now, before = task_vectors.deltas, calibrator.originals.deltas
        own = _rows([_each(before[name], 1.0) for name in router.tensors])
        start = _rows([_sum(now[name], self.scale)[None] for name in router.tensors])[0]
        states = [x.to(start) for x in calibrator.router_states(router)]
        if router.bias:
            states = [torch.cat([x, x.new_ones(len(x), 1)], dim=1) for x in states]
        if self.loss == "harc":
            return harc(start, states, own, self.shrink, router.sigmoid)
        return least_divergence(start, states, own, router.sigmoid)


def _each(delta: Delta, scale: float) -> Tensor:
    """base + scale tau of each fine-tune, [K, *S]."""
    dtype = accumulation_dtype(delta.base.dtype)
    return delta.base.to(dtype) + scale * delta.dense().to(dtype)


def _sum(delta: Delta, scale: float) -> Tensor:
    """base + scale sum tau, [*S]."""
    dtype = accumulation_dtype(delta.base.dtype)
    return delta.base.to(dtype) + scale * delta.dense().to(dtype).sum(0)


def _rows(parts: Sequence[Tensor]) -> list[Tensor]:
    """Weights [K, E, H] and, if there are two parts, biases [K, E] -> K matrices, biases last."""
    weight = parts[0] if len(parts) == 1 else torch.cat([parts[0], parts[1][:, :, None]], dim=2)
    return list(weight)
