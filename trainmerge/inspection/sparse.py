"""Sparse, nearly orthogonal task vectors, as reinforcement learning leaves them.

Legend: `K` experts.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from math import prod

from trainmerge.inspection.findings import Finding
from trainmerge.task_vectors.geometry import Geometry

SPARSE = 0.3  # share of changed entries; supervised fine-tuning changes nearly all
ORTHOGONAL = 0.1  # cosine of two task vectors
RAM_REASON = "task vectors are sparse and nearly orthogonal: an average would dilute them (RAM)"


def is_sparse(geometry: Geometry, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether there are several experts, all of them sparse, and all pairs nearly orthogonal."""
    shares = changed_shares(geometry, shapes)
    cosines = geometry.of(geometry.names).cosines()[0]
    pairs = [float(cosines[i, j]) for i, j in combinations(range(len(shares)), 2)]
    return bool(pairs) and 0 < min(shares) <= max(shares) <= SPARSE and max(map(abs, pairs)) <= ORTHOGONAL


def changed_shares(geometry: Geometry, shapes: Mapping[str, Sequence[int]]) -> list[float]:
    """The share of entries that each expert changed, K numbers; 0 without parameters."""
    size = sum(prod(shapes[name]) for name in geometry.names)
    counts = geometry.both.diagonal(dim1=1, dim2=2).sum(dim=0).tolist()
    return [count / max(1, size) for count in counts]


def sparse_findings(
    experts: Sequence[str], geometry: Geometry, shapes: Mapping[str, Sequence[int]]
) -> Iterator[Finding]:
    """A note if the experts are as reinforcement learning leaves them."""
    if is_sparse(geometry, shapes):
        shares = zip(experts, changed_shares(geometry, shapes), strict=True)
        words = ", ".join(f"{name} {share:.0%}" for name, share in shares)
        yield Finding(
            "note",
            f"the experts changed few entries ({words}) and are nearly orthogonal, as after reinforcement "
            "learning",
            "trainmerge.Ram keeps what one expert alone changed; averages and TIES dilute it",
        )
