"""The starts that are tried: task vectors and coefficients of published methods.

Legend: `K` experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from trainmerge.coefficients.initial import Initial
from trainmerge.coefficients.layer_least_squares import LayerLeastSquares
from trainmerge.preprocess import OptMerge, Preprocess, Ties, Tsv, Wudi

UNIFORM = "task arithmetic"
OWN = "as configured"
GRID = (0.1, 0.2, 0.3, 0.5, 0.7)  # of the uniform coefficient
SCALES = (0.3, 0.6, 1.0)  # of a method's own coefficients: less where it overshoots


@dataclass(frozen=True)
class Start:
    """Task vectors, coefficients, and the scales of these coefficients that are tried first."""

    name: str
    preprocess: Sequence[Preprocess] = ()
    initial: Initial = 1.0
    scales: Sequence[float] = SCALES


def starts(K: int, preprocess: Sequence[Preprocess], initial: Initial) -> list[Start]:
    """The starts for K experts; the configuration's own is one of them."""
    grid = tuple(sorted({*GRID, round(1 / K, 3)}))
    return [
        Start(UNIFORM, scales=grid),
        Start(OWN, preprocess, initial, scales=(1.0,)),
        Start("layer least squares", initial=LayerLeastSquares()),
        Start("TIES", (Ties(),)),
        Start("TSV-M", (Tsv(),)),
        Start("OptMerge", (OptMerge(),)),
        Start("ASWUDI", (Wudi(),)),
    ]
