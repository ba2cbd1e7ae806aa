"""Experts whose units are the base's in another order: their task vectors are as large as the weights."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from trainmerge.align import (
    FAMILIES,
    Align,
    Aligned,
    AttentionHeads,
    Gauge,
    Neurons,
    Pair,
    ResidualStream,
    anatomy,
)
from trainmerge.align import align as line_up
from trainmerge.inspection.attention import UNLOCK, weight_of
from trainmerge.inspection.findings import Finding
from trainmerge.inspection.weights import SCRATCH
from trainmerge.run.opened import Opened
from trainmerge.task_vectors.geometry import Geometry
from trainmerge.task_vectors.parameter_names import kind_of

NEARER = 0.7  # of the distance from the base, below which a permutation says something
METHODS = (ResidualStream(), AttentionHeads(), Neurons())


def permuted_experts(opened: Opened, geometry: Geometry) -> dict[str, Aligned]:
    """Experts that come much nearer to the base when their units are permuted, of those that are far.

    Looked at are experts with a matrix that is nearly orthogonal to the base's. Reads their weights.
    """
    vectors = opened.task_vectors
    if opened.base.config.get("model_type") not in FAMILIES:
        return {}
    directions, found = geometry.cosines_with_base(), {}
    for k, name in enumerate(vectors.experts):
        far = [
            parameter
            for parameter, cosine in zip(geometry.names, directions[:, k].tolist(), strict=True)
            if cosine < SCRATCH and kind_of(parameter) not in ("bias", "norm")
        ]
        if far:
            names = [own for own in vectors.deltas if own not in opened.base.side]
            base, expert = (partial(weight_of, vectors, expert=number) for number in (None, k))
            done = line_up(Pair(anatomy(opened.base.config, names), base, expert), METHODS)
            if done.after < NEARER * done.before:
                found[name] = done
    return found


def permuted_findings(found: Mapping[str, Aligned]) -> Iterator[Finding]:
    """A warning per permuted expert."""
    for name, done in found.items():
        moved = ", ".join(f"{count} {kind}" for kind, count in done.moved.items())
        methods = ", ".join(f"trainmerge.{type(method).__name__}" for method in needed(done))
        yield Finding(
            "warning",
            f"{name} looks permuted: its task vector is as large as the weights, and with {moved} in other "
            f"places its distance from the base is {done.after:.3g} instead of {done.before:.3g}",
            f"recipe.align: [{methods}]",
        )


def needed(done: Aligned) -> list[Align]:
    """The methods that moved something."""
    return [method for method in METHODS if method.units in done.moved]


def suggested_alignment(found: Mapping[str, Aligned], findings: Sequence[Finding]) -> list[Align]:
    """What the recipe needs in `align`, by the permuted experts and the findings of locked attention."""
    methods: list[Align] = [m for m in METHODS if any(m in needed(done) for done in found.values())]
    locked = any(finding.remedy.startswith(UNLOCK) for finding in findings)
    return [*methods, Gauge()] if locked else methods
