"""Parameters in portions whose layers' second moments fit into a given number of bytes.

Legend: `n` inputs of a linear layer.
"""

from collections.abc import Iterator

from trainmerge.task_vectors.delta import TaskVectors

MOMENTS = 1 << 30  # bytes of second moments per pass of each expert


def portions(task_vectors: TaskVectors, size: int = MOMENTS) -> Iterator[list[str]]:
    """Groups of consecutive parameters with at most `size` bytes of second moments [n, n], or one alone."""
    portion: list[str] = []
    held = 0
    for name, delta in task_vectors.deltas.items():
        inputs = delta.shape[0 if delta.role == "transposed" else -1] if len(delta.shape) == 2 else 0
        more = 4 * inputs**2
        if portion and held + more > size:
            yield portion
            portion, held = [], 0
        portion.append(name)
        held += more
    if portion:
        yield portion
