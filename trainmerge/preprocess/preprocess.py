"""What every preprocessor is, and how its result is kept on disk.

Legend: `K` experts, `*S` parameter shape, `n` inputs of a linear layer.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor
from typing_extensions import override

from trainmerge.kernels import accumulation_dtype
from trainmerge.storage import MappedFile, write_safetensors
from trainmerge.task_vectors import Delta, TaskVectors

PIECE = 1 << 22  # entries: 16 MiB of float32


@dataclass(frozen=True)
class Preprocess(ABC):
    """New task vectors from old, a parameter at a time, in bounded memory."""

    @property
    def entrywise(self) -> bool:
        """Whether an entry's result depends on its own place and on ranks over all parameters only.

        Then large parameters come in pieces, and no more than a piece of each expert is held.
        """
        return False

    @abstractmethod
    def __call__(self, task_vectors: TaskVectors) -> Iterator[tuple[str, Tensor]]:
        """Every parameter's name and its K new differences [K, *S], in the order of `task_vectors.deltas`."""


class Calibrator(Protocol):
    """The experts at work on their own unlabeled examples: what `trainmerge.measure` offers."""

    def in_order(self, names: Iterable[str]) -> list[str]:
        """These parameters in the order in which the network has them."""

    def grams(self, expert: int, names: Sequence[str], merged: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean x x^T [n, n] of what each of these linear layers reads; others of `names` are left out.

        `merged` are weights that replace the expert's own during the pass.
        """

    def gradients(self, expert: int, sampled: bool) -> Iterator[dict[str, Tensor]]:
        """Gradients of -log p(y | x) by the weights at the expert, one example after another.

        y is drawn from the expert's own predictions, or the text itself.
        """

    def keep(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same, held by a file instead of memory."""


@dataclass(frozen=True)
class Informed(Preprocess):
    """New task vectors from old and from what the experts do on calibration examples. No label is read."""

    @override
    def __call__(self, task_vectors: TaskVectors) -> Iterator[tuple[str, Tensor]]:
        raise TypeError(f"{type(self).__name__} needs calibration examples: use it in a fit")

    @abstractmethod
    def informed(self, task_vectors: TaskVectors, calibrator: Calibrator) -> Iterator[tuple[str, Tensor]]:
        """Every parameter's name and its K new differences [K, *S], in the order of `task_vectors.deltas`."""


def apply(
    task_vectors: TaskVectors,
    methods: Sequence[Preprocess],
    folder: Path,
    inputs: str,
    examples: str = "",
    calibrator: Calibrator | None = None,
) -> TaskVectors:
    """Apply the methods in order; each result is written once to `folder`, mapped, and found again.

    `inputs` identifies base and experts (their checksums), `examples` the calibration: with the methods'
    fields they name the file.

    Raises:
        ValueError: an informed method's result is not there, and no calibrator to make it.
    """
    key = inputs
    for method in methods:
        depends_on = f" {examples}" if isinstance(method, Informed) else ""
        key = hashlib.sha256(f"{key} {method!r}{depends_on}".encode()).hexdigest()
        path = folder / f"task_vectors-{key[:16]}.safetensors"
        if not path.exists():
            _write(path, task_vectors, method, calibrator)
        task_vectors = _mapped(path, task_vectors)
    return task_vectors


def _write(path: Path, task_vectors: TaskVectors, method: Preprocess, calibrator: Calibrator | None) -> None:
    names: Mapping[str, str] = {}
    if method.entrywise:
        pieces, names = in_pieces(task_vectors)
        results = method(pieces)
    elif not isinstance(method, Informed):
        results = method(task_vectors)
    elif calibrator is not None:
        results = method.informed(task_vectors, calibrator)
    else:
        raise ValueError(
            f"{path}: what {type(method).__name__} made of the calibration examples is gone; fit again"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    specs = {
        _key(name, expert): (accumulation_dtype(delta.base.dtype), tuple(delta.shape))
        for name, delta in task_vectors.deltas.items()
        for expert in task_vectors.experts
    }
    tensors = (
        (_key(names.get(name, name), expert), tau)
        for name, taus in results
        for expert, tau in zip(task_vectors.experts, taus, strict=True)
    )
    write_safetensors(path, specs, tensors, {"method": repr(method)})


def in_pieces(task_vectors: TaskVectors) -> tuple[TaskVectors, dict[str, str]]:
    """The same with large parameters cut into rows, in order, and the parameter that each piece is of."""
    pieces: dict[str, Delta] = {}
    names: dict[str, str] = {}
    for name, delta in task_vectors.deltas.items():
        size = delta.shape.numel()
        rows = max(1, PIECE * delta.shape[0] // size) if size > PIECE else 0
        for first in range(0, delta.shape[0], rows) if rows else ():
            part = slice(first, min(first + rows, delta.shape[0]))
            piece = f"{name}[{part.start}:{part.stop}]"
            pieces[piece], names[piece] = delta.rows(part), name
        if not rows:
            pieces[name] = delta
    return TaskVectors(task_vectors.experts, pieces), names


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
