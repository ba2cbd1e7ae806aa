"""Apply preprocessors in memory, for task vectors without files: no workspace, no cache.

Legend: `K` experts, `*S` parameter shape.
"""

from collections.abc import Sequence

from trainmerge.preprocess.base import Informed, Preprocess
from trainmerge.preprocess.left_out import announced
from trainmerge.task_vectors.delta import TaskVectors


def apply_in_memory(task_vectors: TaskVectors, methods: Sequence[Preprocess]) -> TaskVectors:
    """Apply the methods in order. The result is K differences [*S] per parameter, in float32 or wider.

    Raises:
        ValueError: a method needs calibration examples.
    """
    if informed := [type(method).__name__ for method in methods if isinstance(method, Informed)]:
        raise ValueError(
            f"{', '.join(informed)}: needs the experts' layers on calibration examples, which works for "
            "transformers folders only (tm.Recipe and tm.fit). Choose a method without data"
        )
    for method in methods:
        results = announced(method, task_vectors, method(task_vectors))
        task_vectors = task_vectors.replaced({name: taus.unbind() for name, taus in results})
    return task_vectors
