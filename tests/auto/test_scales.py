"""The search of scales, on functions whose best point is known.

Legend: `K` experts.
"""

from collections.abc import Callable, Sequence

import pytest

from trainmerge.auto.scales import STEPS, common_scale, own_scales
from trainmerge.auto.trials import Trial

K = 3


def judge(
    loss: Callable[[float], float],
) -> tuple[Callable[[Sequence[float]], Trial], list[tuple[float, ...]]]:
    asked: list[tuple[float, ...]] = []

    def judged(scales: Sequence[float]) -> Trial:
        asked.append(tuple(scales))
        return Trial("start", tuple(scales), tuple(1 - loss(scale) for scale in scales))

    return judged, asked


@pytest.mark.parametrize("best", [0.1, 0.45, 0.62, 1.0, 1.3])
def test_the_common_scale_is_near_the_best(best: float) -> None:
    judged, asked = judge(lambda scale: (scale - best) ** 2)
    found = common_scale(judged, K, (0.3, 0.6, 1.0))
    assert abs(found.scales[0] - best) <= 0.12
    assert len(set(found.scales)) == 1
    assert len(asked) == len({*asked}) <= 7
    assert found.mean == max(judged(scales).mean for scales in [*asked])


def test_a_start_of_one_scale_is_judged_once() -> None:
    judged, asked = judge(lambda scale: scale**2)
    assert common_scale(judged, K, (1.0,)).scales == (1.0,) * K
    assert len(asked) == 1


def test_every_expert_moves_towards_its_own_best() -> None:
    targets = (0.4, 0.5, 0.6)

    def judged(scales: Sequence[float]) -> Trial:
        losses = [(scale - target) ** 2 for scale, target in zip(scales, targets, strict=True)]
        return Trial("start", tuple(scales), tuple(1 - loss for loss in losses))

    assert own_scales(judged, [0.5] * K) == (0.5 * STEPS[0], 0.5, 0.5 * STEPS[1])
