"""Search the scale of a start's coefficients: first one for all experts, then one each.

Legend: `K` experts.
"""

from collections.abc import Callable, Sequence

from trainmerge.auto.trials import Trial

Judge = Callable[[Sequence[float]], Trial]  # of K scales
REFINE = 2  # rounds between the best common scale and its neighbours
STEPS = (0.85, 1.18)  # factors of one expert's scale


def common_scale(judge: Judge, K: int, scales: Sequence[float]) -> Trial:
    """The best of these scales for all experts, then of those between it and its neighbours.

    Beyond the largest scale the next one is as far again.
    """
    found = {scale: judge([scale] * K) for scale in sorted(scales)}
    for _ in range(REFINE if len(scales) > 1 else 0):
        order = [0.0, *sorted(found)]
        at = order.index(max(found, key=lambda scale: found[scale].mean))
        below = (order[at - 1] + order[at]) / 2
        above = (order[at] + order[at + 1]) / 2 if at + 1 < len(order) else 2 * order[at] - order[at - 1]
        found |= {scale: judge([scale] * K) for scale in (below, above) if scale}
    return max(found.values(), key=lambda trial: trial.mean)


def most_merges(scales: Sequence[float]) -> int:
    """The most merges that `common_scale` judges."""
    return len(scales) + 2 * REFINE * (len(scales) > 1)


def own_scales(judge: Judge, scales: Sequence[float]) -> Sequence[float]:
    """One scale per expert from common ones, K: each is tried a step lower and higher, in turn."""
    best = judge(scales)
    for k in range(len(scales)):
        scales = best.scales
        for step in STEPS:
            best = max(best, judge([*scales[:k], scales[k] * step, *scales[k + 1 :]]), key=_mean)
    return best.scales


def _mean(trial: Trial) -> float:
    return trial.mean
