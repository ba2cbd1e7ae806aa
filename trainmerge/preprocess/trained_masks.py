"""Localize-and-Stitch with trained masks: the entries of each expert that its own outputs need.

He et al., TMLR 2025 (arXiv 2408.13656). There the masks are trained by labels; here each expert imitates
itself on its unlabeled examples.

Legend: `K` experts, `*S` shape of a parameter, `n` entries that an expert changed.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.base import Calibrator, Informed
from trainmerge.system.ranges import check_fields
from trainmerge.task_vectors.delta import TaskVectors, dense_term


@dataclass(frozen=True)
class TrainedMasks(Informed):
    """m_k tau_k / max(1, sum_j m_j), m_k a mask of single entries that is trained for expert k alone.

    With logits x, m = sigmoid(x), and L the mean KL(expert || base + m tau) over the predictions on the
    expert's own unlabeled examples, which is L_0 at the base, steps from x = 0 lower L / L_0 + sparsity *
    mean(m) over the n entries that the expert changed:

        x <- x - rate * clip(n G tau / L_0 + sparsity, -1, 1),    G = dL/dW,    rate falling to 0

    Then the entries with x > 0 are kept, as the paper rounds. The mean of n G tau / L_0 on the straight way
    from the base to the expert is -1, so an entry stays that explains more than `sparsity` times the mean.

    The paper lowers the cross-entropy of labels instead, by ten plain gradient steps on logits that start at
    5 for the largest entries and at -5 elsewhere. Here the factor m (1 - m) of the gradient in x is left out,
    which would hold back open and closed entries, and no entry moves further than `rate`: one that explains
    a hundred times the mean would overshoot. Its merge is base + sum of the results, coefficient 1.

    An expert that predicts as the base does on its examples, L_0 = 0, needs none of its entries.
    Parameters that a fit does not learn keep their whole change. Regressions, which have no predictions, are
    refused. Needs 4 bytes per weight for the logits of one expert at a time and 4 for the gradient; in files
    K for the masks, and 4 bytes per word of the vocabulary and token of an expert's examples.

    Args:
        sparsity: The cost of an open mask, in units of the base's divergence; more closes more entries.
        steps: Steps per expert, each a forward and backward of all of its examples.
        rate: The largest move of a logit in the first step.
    """

    sparsity: float = 1.0
    steps: int = 50
    rate: float = 0.2

    def __post_init__(self) -> None:
        check_fields(self, sparsity="(0, inf)", steps="[1, inf)", rate="(0, inf)")

    @override
    def informed(self, task_vectors: TaskVectors, calibrator: Calibrator) -> Iterator[tuple[str, Tensor]]:
        masks = [
            calibrator.keep(self.masks(task_vectors, expert, calibrator))
            for expert in range(len(task_vectors.experts))
        ]
        for name, delta in task_vectors.deltas.items():
            taus = delta.dense()
            kept = torch.stack([own.get(name, tau != 0) for own, tau in zip(masks, taus, strict=True)])
            yield name, taus.mul_(kept).div_(kept.sum(0).clamp_min_(1))

    def masks(self, task_vectors: TaskVectors, expert: int, calibrator: Calibrator) -> dict[str, Tensor]:
        """The mask of one expert's entries, [*S] bool, of every parameter that has a gradient."""
        own = _Imitated(task_vectors, expert, calibrator)
        with calibrator.merge_of(task_vectors, 0.0):
            first, slopes = own.measure()
            if math.isnan(first):
                raise ValueError(
                    f"TrainedMasks: the predictions of base or {task_vectors.experts[expert]} are not finite "
                    "on its examples, as float16 ones that overflow"
                )
            logits = {name: torch.zeros(slope.shape) for name, slope in slopes.items()}
            size = sum(int(own.tau(name).count_nonzero()) for name in logits)
            bar = f"training the mask of {task_vectors.experts[expert]}"
            for step in track(range(self.steps if first > 0 else 0), description=bar):
                own.write((name, x.sigmoid()) for name, x in logits.items())
                _, slopes = own.measure()
                rate = self.rate * (1 - step / self.steps)
                for name, x in logits.items():
                    pull = size / first * slopes.pop(name).to(x) * own.tau(name).to(x)
                    x.sub_(pull.add_(self.sparsity).clamp_(-1, 1), alpha=rate)
            kept = {name: (x > 0) & (own.tau(name) != 0) for name, x in logits.items()}
            own.write(kept.items())
            last, _ = own.measure()
        share = sum(int(mask.sum()) for mask in kept.values()) / max(1, size)
        words = f"{100 * share:.3g}% of its changed entries; divergence {last:.3g}, the base's {first:.3g}"
        print(f"{task_vectors.experts[expert]}: {words}", file=sys.stderr, flush=True)
        return kept


class _Imitated:
    """One expert: the model that keeps a part of it, and how far that is from the expert."""

    def __init__(self, task_vectors: TaskVectors, expert: int, calibrator: Calibrator) -> None:
        self.deltas, self.expert, self.calibrator = task_vectors.deltas, expert, calibrator
        self.measure: Callable[[], tuple[float, dict[str, Tensor]]] = calibrator.imitation(expert)

    def tau(self, name: str) -> Tensor:
        delta = self.deltas[name]
        return dense_term(delta.terms[self.expert], delta.base)

    def write(self, masks: Iterable[tuple[str, Tensor]]) -> None:
        for name, mask in masks:
            base, tau = self.deltas[name].base, self.tau(name)
            self.calibrator.write(name, base.to(tau) + tau * mask)
