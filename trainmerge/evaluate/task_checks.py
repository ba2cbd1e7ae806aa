"""What a task's test file must hold."""

from collections.abc import Sequence


def check_labels(file: str, labels: Sequence[object], classes: int | None) -> None:
    """Raise ValueError for a label that is no class: an integer from 0 to `classes` - 1."""
    for i, label in enumerate(labels):
        if not isinstance(label, int) or isinstance(label, bool) or label < 0:
            raise ValueError(f"{file}: example {i} has the label {label!r}, not a class number (0, 1, ...)")
        if classes is not None and label >= classes:
            raise ValueError(
                f"{file}: example {i} has the label {label}, but the task has {classes} classes, 0 to "
                f"{classes - 1}: correct the label or the classifier"
            )
