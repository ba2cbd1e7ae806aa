"""What every preprocessor is, and how its result is kept on disk.

Legend: `K` experts, `*S` parameter shape.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from trainmerge.kernels import accumulation_dtype
from trainmerge.storage import MappedFile, write_safetensors
from trainmerge.task_vectors import TaskVectors


@dataclass(frozen=True)
class Preprocess(ABC):
    """New task vectors from old, a parameter at a time, in bounded memory."""

    @abstractmethod
    def __call__(self, task_vectors: TaskVectors) -> Iterator[tuple[str, Tensor]]:
        """Every parameter's name and its K new differences [K, *S], in the order of `task_vectors.deltas`."""


def apply(task_vectors: TaskVectors, methods: Sequence[Preprocess], folder: Path, inputs: str) -> TaskVectors:
    """Apply the methods in order; each result is written once to `folder`, mapped, and found again.

    `inputs` identifies base and experts (their checksums): with the methods' fields it names the file.
    """
    key = inputs
    for method in methods:
        key = hashlib.sha256(f"{key} {method!r}".encode()).hexdigest()
        path = folder / f"task_vectors-{key[:16]}.safetensors"
        if not path.exists():
            _write(path, task_vectors, method)
        task_vectors = _mapped(path, task_vectors)
    return task_vectors


def _write(path: Path, task_vectors: TaskVectors, method: Preprocess) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    specs = {
        _key(name, expert): (accumulation_dtype(delta.base.dtype), tuple(delta.shape))
        for name, delta in task_vectors.deltas.items()
        for expert in task_vectors.experts
    }
    tensors = (
        (_key(name, expert), tau)
        for name, taus in method(task_vectors)
        for expert, tau in zip(task_vectors.experts, taus, strict=True)
    )
    write_safetensors(path, specs, tensors, {"method": repr(method)})


def _mapped(path: Path, task_vectors: TaskVectors) -> TaskVectors:
    file = MappedFile(path)
    return task_vectors.replaced(
        {
            name: [file.read(_key(name, expert)) for expert in task_vectors.experts]
            for name in task_vectors.deltas
        }
    )


def _key(name: str, expert: str) -> str:
    return f"{expert}/{name}"
