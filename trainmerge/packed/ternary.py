"""The signs of the largest entries and one scale: ComPEFT (Yadav et al., arXiv 2311.13171). 1.6 bits.

ComPEFT keeps the top share k, scales by alpha times the standard deviation, and tries both on labels. The
scale of least squares is the mean magnitude of the kept entries; and with it the error of n kept entries is
||tau||^2 - (their sum)^2 / n, so the best n follows from one sort.

Legend: `K` tasks, `R` rows, `W` entries of a row, `n` kept entries.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.packed.bits import pack_trits
from trainmerge.packed.codec import Codec, EncodedParameter
from trainmerge.packed.parameter import Parameter
from trainmerge.system.ranges import check_fields
from trainmerge.task_vectors.top_k import count


@dataclass(frozen=True)
class Signs(Codec):
    """Signs and a scale, per tensor and task.

    Args:
        share: The share of entries to keep, in (0, 1]; ComPEFT tries 0.05 to 0.5. None is the share with the
            least squared error, per tensor.
    """

    share: float | None = None

    def __post_init__(self) -> None:
        check_fields(self, "ternary", share="(0, 1]")

    @property
    @override
    def name(self) -> str:
        return "ternary"

    @override
    def encode(self, parameter: Parameter) -> EncodedParameter:
        own: list[dict[str, Tensor]] = []
        scales = torch.zeros(parameter.tasks)
        for task in range(parameter.tasks):
            tau = parameter.tau(task)
            cut, scale = magnitude_threshold(tau.abs(), self.share)
            scales[task] = scale
            own.append({"t": pack_trits(tau.sign() * (tau.abs() >= cut))} if scale else {})
        return EncodedParameter({}, tuple(own), scales)


def magnitude_threshold(magnitudes: Tensor, share: float | None) -> tuple[float, float]:
    """The magnitude from which entries are kept, and the mean of those; (inf, 0) of zeros.

    All entries of equal magnitude are kept or none. Without a share, n is the largest (sum)^2 / n.
    """
    ordered = magnitudes.reshape(-1).sort(descending=True).values
    sums = ordered.double().cumsum(0)
    if not len(ordered) or not float(ordered[0]):
        return float("inf"), 0.0
    if share is None:
        kept = int((sums.square() / torch.arange(1, len(sums) + 1)).argmax())
    else:
        kept = max(1, count(len(ordered), share)) - 1
    cut = ordered[kept]
    number = int((magnitudes >= cut).sum()) if cut > 0 else int((magnitudes > 0).sum())
    least = float(cut) if cut > 0 else float(ordered[number - 1])
    return least, float(sums[number - 1]) / number
