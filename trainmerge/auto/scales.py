"""Search the scale of a start's coefficients: first one for all experts, then one each.

Legend: `K` experts.
"""

from collections.abc import Callable, Sequence

from trainmerge.auto.trials import Trial

Judge = Callable[[Sequence[float]], Trial]  # of K scales
REFINE = 2  # halvings of the interval around the best common scale
STEPS = (0.85, 1.18)  # factors of one expert's scale


def common_scale(judge: Judge, K: int, scales: Sequence[float]) -> Trial:
    """The best of these scales for all experts, then between it and its neighbours."""
    found = {scale: judge([scale] * K) for scale in scales}
    for _ in range(REFINE if len(scales) > 1 else 0):
        order = sorted(found)
        at = order.index(max(found, key=lambda scale: found[scale].mean))
        for neighbour in (order[at - 1] if at else 0.0, order[min(at + 1, len(order) - 1)]):
            middle = (order[at] + neighbour) / 2
            if middle not in found:
                found[middle] = judge([middle] * K)
    return max(found.values(), key=lambda trial: trial.mean)


def own_scales(judge: Judge, best: Trial, rounds: int = 2) -> Trial:
    """One scale per expert from the best common one, by coordinate search."""
    for _ in range(rounds):
        before = best
        for k in range(len(best.scales)):
            for step in STEPS:
                scales = [*best.scales]
                scales[k] *= step
                best = max(best, judge(scales), key=lambda trial: trial.mean)
        if best is before:
            return best
    return best
