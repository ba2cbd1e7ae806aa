"""Where a suggested fit begins: task vectors and coefficients, by what this project's suites measured.

Legend: `K` experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainmerge.inspection.sparse import RAM_REASON
from trainmerge.kernels import LowRank
from trainmerge.preprocess import OptMerge, Preprocess, Ram, Tsv
from trainmerge.run.opened import Opened
from trainmerge.run.recipe import Recipe
from trainmerge.task_vectors.geometry import Geometry

ALIKE = 0.5  # mean cosine of the experts' task vectors, above which their average is suggested
BEST = (
    "full experts: learning from OptMerge's task vectors closed more of the gap than from plain ones in "
    "this project's suites"
)


@dataclass(frozen=True)
class Beginning:
    """Preprocessors and starting coefficients of a suggestion, with reasons."""

    preprocess: Sequence[Preprocess]
    initial: Any  # as `model.initial` of a configuration
    reasons: Mapping[str, str]  # key -> why


def is_low_rank(opened: Opened) -> bool:
    """Whether every expert is low-rank in some parameter, as adapters are."""
    deltas = opened.task_vectors.deltas.values()
    return all(
        any(isinstance(delta.terms[k], LowRank) for delta in deltas)
        for k in range(len(opened.task_vectors.experts))
    )


def beginning(
    recipe: Recipe, geometry: Geometry | None, sparse: bool, low_rank: bool, initial: Any
) -> Beginning:
    """The start of a fit that learns. A recipe's own preprocessing stays, from its own `initial`."""
    K = len(recipe.experts)
    if recipe.preprocess and initial is not None:
        return Beginning(
            recipe.preprocess, initial, {"model.initial": "as configured for the recipe's preprocessing"}
        )
    if recipe.preprocess:
        return _uniform(K, recipe.preprocess)
    if sparse:
        return Beginning(
            [Ram()], 1.0, {"recipe.preprocess": RAM_REASON, "model.initial": "RAM's native coefficient"}
        )
    if (alike := _alike(geometry)) > ALIKE:
        reason = f"task vectors are similar (mean cosine {alike:.2f}): their average, 1 / {K}"
        return Beginning((), round(1 / K, 3), {"model.initial": reason})
    if low_rank or K == 1:
        return _uniform(K, ())
    native = "OptMerge's native coefficient; `trainmerge auto` scales it by the loss on held-out examples"
    return Beginning([OptMerge()], 1.0, {"recipe.preprocess": BEST, "model.initial": native})


def closed_form(sparse: bool, low_rank: bool) -> Beginning:
    """The start of a merge without learning: the method at its native coefficient."""
    method: Preprocess = Ram() if sparse else Tsv() if low_rank else OptMerge()
    title = {Ram: "RAM", Tsv: "TSV-M", OptMerge: "OptMerge"}[type(method)]
    why = "not every expert has calibration examples; a closed form needs none"
    reasons = {
        "recipe.preprocess": f"{why}; {RAM_REASON}" if sparse else why,
        "model.initial": f"{title}'s native coefficient",
    }
    return Beginning([method], 1.0, reasons)


def _alike(geometry: Geometry | None) -> float:
    """The mean cosine of two experts' task vectors; 0 if it is unknown."""
    if geometry is None:
        return 0.0
    cosines = geometry.of(geometry.names).cosines()[0]
    K = len(cosines)
    return float((cosines.nan_to_num(0).sum() - K) / (K * (K - 1))) if K > 1 else 0.0


def _uniform(K: int, preprocess: Sequence[Preprocess]) -> Beginning:
    """The best uniform coefficient falls with the number of experts."""
    start = 0.5 if K <= 2 else 0.4 if K <= 5 else 0.3
    reason = f"{K} experts: close to the best single coefficient in most of this project's suites"
    return Beginning(preprocess, start, {"model.initial": reason})
