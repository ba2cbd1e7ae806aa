"""Findings from the weights: near-duplicate experts, outliers, tensors unchanged or not fine-tuned.

Legend: `K` experts.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations

from trainmerge.inspection.findings import Finding
from trainmerge.preprocess.left_out import left_out_sentence
from trainmerge.run.opened import Opened
from trainmerge.run.recipe import Recipe
from trainmerge.system.text import listed
from trainmerge.task_vectors.geometry import Geometry
from trainmerge.task_vectors.parameter_names import kind_of

TWINS = 0.95  # cosine of two task vectors, above which they are near duplicates
FAR = 3.0  # times the median norm of the task vectors
SCRATCH = 0.3  # cosine of base and expert, below which a matrix was not fine-tuned from the base


def weight_findings(experts: Sequence[str], geometry: Geometry) -> Iterator[Finding]:
    """All findings from the inner products of base and task vectors; of damaged weights only these."""
    if damaged := [*_not_finite(experts, geometry)]:
        yield from damaged
        return
    yield from _twins(experts, geometry)
    yield from _lengths(experts, geometry)
    yield from _scratch(experts, geometry)


def preprocess_findings(recipe: Recipe, opened: Opened, geometry: Geometry | None) -> Iterator[Finding]:
    """What each preprocessor leaves out, with its share of the task vectors if the weights were read."""
    squares = {}
    if geometry is not None:
        sums = geometry.gram.diagonal(dim1=1, dim2=2).sum(dim=1).tolist()
        squares = dict(zip(geometry.names, sums, strict=True))
    for method in recipe.preprocess:
        if words := left_out_sentence(method, opened.task_vectors, squares):
            yield Finding("note", words)


def _not_finite(experts: Sequence[str], geometry: Geometry) -> Iterator[Finding]:
    """Experts with NaN or infinite differences from the base, which a fit refuses."""
    finite = geometry.gram.diagonal(dim1=1, dim2=2).isfinite()
    for k, name in enumerate(experts):
        if not finite[:, k].all():
            lost = [p for p, sound in zip(geometry.names, finite[:, k].tolist(), strict=True) if not sound]
            yield Finding(
                "error",
                f"{name}: {listed(lost)} have NaN or infinite values, or the base has",
                "download or train again",
            )


def _twins(experts: Sequence[str], geometry: Geometry) -> Iterator[Finding]:
    cosines = geometry.of(geometry.names).cosines()[0]
    for i, j in combinations(range(len(experts)), 2):
        cosine = float(cosines[i, j])
        if cosine > TWINS:
            yield Finding(
                "warning",
                f"the task vectors of {experts[i]} and {experts[j]} are nearly parallel (cosine "
                f"{cosine:.3f})",
                "leave one out: together they double the same change",
            )
        elif cosine < -TWINS:
            yield Finding(
                "warning",
                f"the task vectors of {experts[i]} and {experts[j]} are opposed (cosine {cosine:.3f})",
            )


def _lengths(experts: Sequence[str], geometry: Geometry) -> Iterator[Finding]:
    norms = geometry.of(geometry.names).norms()[0]
    changed = norms[norms > 0]
    middle = float(changed.quantile(0.5)) if len(changed) else 0.0
    for name, norm in zip(experts, norms.tolist(), strict=True):
        if not norm:
            yield Finding(
                "warning", f"{name} is bitwise equal to the base", "leave it out, or check its path"
            )
        elif norm > FAR * middle or norm * FAR < middle:
            relation = f"{norm / middle:.2g} times the experts' median"
            yield Finding(
                "warning",
                f"{name}: the norm of its task vector is {relation}",
                "set one starting coefficient per expert (`model.initial`): at equal coefficients, the "
                "largest task vector dominates",
            )
    per_parameter = geometry.norms()
    for k, name in enumerate(experts):
        still = int((per_parameter[:, k] == 0).sum())
        if norms[k] > 0 and still and still < len(geometry.names):
            yield Finding(
                "note", f"{name}: {still} of {len(geometry.names)} tensors are unchanged from the base"
            )


def _scratch(experts: Sequence[str], geometry: Geometry) -> Iterator[Finding]:
    """Matrices only: biases and norm weights may change direction in fine-tuning."""
    directions = geometry.cosines_with_base()
    for k, name in enumerate(experts):
        fresh = [
            parameter
            for parameter, cosine in zip(geometry.names, directions[:, k].tolist(), strict=True)
            if kind_of(parameter) not in ("bias", "norm") and cosine < SCRATCH  # false of NaN
        ]
        if fresh:
            yield Finding(
                "warning",
                f"{name}: {listed(fresh)} are nearly orthogonal to the base: trained from scratch, or from "
                "another model",
                "leave them out with recipe.ignore or grouping.exclude",
            )
