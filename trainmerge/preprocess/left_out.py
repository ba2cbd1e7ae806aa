"""Name the parameters to which a method does not apply, with their share of the task vectors.

Legend: `K` experts.
"""

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from trainmerge.preprocess.base import Preprocess
from trainmerge.system.text import listed
from trainmerge.task_vectors.delta import Delta, TaskVectors
from trainmerge.task_vectors.square_norms import task_square_norm

EXPECTED = ("norms and biases", "embeddings", "matrices")  # published methods leave these out too; `exclude`


def left_out_sentence(method: Preprocess, task_vectors: TaskVectors, squares: Mapping[str, float]) -> str:
    """What a method leaves out, and what becomes of it; empty if it applies to everything.

    `squares` are the squared norms of every parameter's K task vectors, or nothing if they are not known.

    >>> import torch
    >>> from trainmerge.kernels import Difference
    >>> from trainmerge.preprocess.tsv import Tsv
    >>> base = torch.zeros(3)
    >>> given = TaskVectors(("a",), {"norm.weight": Delta(base, (Difference(base),))})
    >>> left_out_sentence(Tsv(), given, {"norm.weight": 1.0})
    "Tsv: 1 norms and biases (norm.weight; 100% of the task vectors' squared norm) are divided by K"
    """
    total = sum(squares.values())
    parts = []
    for kind, names in left_out(method, task_vectors).items():
        share = sum(squares[name] for name in names) / total if total else None
        words = "" if share is None else f"; {100 * share:.3g}% of the task vectors' squared norm"
        parts.append(f"{len(names)} {kind} ({listed(names)}{words})")
    return f"{type(method).__name__}: {', '.join(parts)} are {method.otherwise_is()}" if parts else ""


def left_out(method: Preprocess, task_vectors: TaskVectors) -> dict[str, list[str]]:
    """Kind -> the parameters of this kind to which the method does not apply."""
    found: dict[str, list[str]] = {}
    for name, delta in task_vectors.deltas.items():
        if not method.applies_to(name, delta):
            found.setdefault(_kind(delta), []).append(name)
    return found


def announced(
    method: Preprocess, task_vectors: TaskVectors, results: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The results; after them, one line on stderr about what the method left out.

    A warning if that includes convolutions or other stacks, which are most of some networks.
    """
    squares: dict[str, float] = {}
    kinds = left_out(method, task_vectors)
    for name, taus in results:
        if kinds and name not in squares:
            squares[name] = task_square_norm(name, task_vectors.deltas[name])
        yield name, taus
    if kinds.keys() - set(EXPECTED):
        warnings.warn(left_out_sentence(method, task_vectors, squares), stacklevel=2)
    elif kinds:
        print(left_out_sentence(method, task_vectors, squares), file=sys.stderr, flush=True)


def _kind(delta: Delta) -> str:
    if delta.role == "vector" or len(delta.shape) < 2:
        return "norms and biases"
    if delta.role == "flat":
        return "stacks of experts in two dimensions"
    if delta.role == "embedding":
        return "embeddings"
    if delta.matrices and delta.role != "other":
        return "matrices"
    return "convolutions" if delta.role == "convolution" or len(delta.shape) > 3 else "other parameters"
