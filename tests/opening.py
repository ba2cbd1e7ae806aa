"""Base and experts -> their task vectors, as a recipe opens them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainmerge.checkpoints import Checkpoint, find_sources
from trainmerge.task_vectors.delta import TaskVectors


def open_task_vectors(base: Checkpoint, experts: Mapping[str, str | Path], **options: Any) -> TaskVectors:
    """The task vectors of `find_sources`, still on disk."""
    return find_sources(base, experts, **options).open(base)
