"""Squared norms of task vectors, and the share that some parameters have of them.

Legend: `K` experts.
"""

from collections.abc import Iterable

from trainmerge.task_vectors.delta import Delta, TaskVectors, dense_term
from trainmerge.task_vectors.pieces import in_pieces


def share_of(task_vectors: TaskVectors, names: Iterable[str]) -> str:
    """The part of the task vectors' squared norm that these parameters have, in words."""
    squares = {name: task_square_norm(name, delta) for name, delta in task_vectors.deltas.items()}
    share = sum(squares[name] for name in names) / (sum(squares.values()) or 1.0)
    return f"{100 * share:.3g}% of the task vectors' squared norm"


def task_square_norm(name: str, delta: Delta) -> float:
    """The squared norm of its K task vectors, a piece at a time."""
    pieces = (part for _, _, part in in_pieces(name, delta))
    return sum(
        float(dense_term(term, piece.base).double().square().sum())
        for piece in pieces
        for term in piece.terms
    )
