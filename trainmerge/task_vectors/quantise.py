"""Quantised task vectors for the fit: 8 or 2 bits per weight. The export always uses the exact ones.

Matrices are quantised; vectors, scalars and low-rank terms are unchanged.

Legend: `R` rows, `W` elements of a row.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.kernels import Difference, ExpertWeight, Quantised, Term
from trainmerge.kernels.quantised import PER_BYTE, pack_codes
from trainmerge.system.ranges import check_fields
from trainmerge.system.safetensors_file import MappedFile, write_safetensors
from trainmerge.system.safetensors_format import Specs
from trainmerge.system.workspace import cached, digest
from trainmerge.task_vectors.delta import Delta, TaskVectors, dense_term
from trainmerge.task_vectors.top_k import count, cuts

PIECE = 1 << 22  # entries at a time: 16 MiB of float32


@dataclass(frozen=True)
class Quantise(ABC):
    """A quantisation of matrices to integers and scales."""

    @property
    @abstractmethod
    def bytes_per_weight(self) -> float:
        """Bytes per weight on disk, without scales."""

    @abstractmethod
    def width(self, width: int) -> int:
        """Bytes of a row with this many weights."""

    @abstractmethod
    def scales(self, rows: int) -> int:
        """Number of scales of a matrix with this many rows."""

    @abstractmethod
    def __call__(self, term: Term, base: Tensor) -> Iterator[Quantised]:
        """Consecutive pieces of rows of one expert's difference, each with the scales of its rows."""


@dataclass(frozen=True)
class Int8(Quantise):
    """8 bits per weight: each row is scaled by its largest magnitude to -127 .. 127."""

    @property
    @override
    def bytes_per_weight(self) -> float:
        return 1.0

    @override
    def width(self, width: int) -> int:
        return width

    @override
    def scales(self, rows: int) -> int:
        return rows

    @override
    def __call__(self, term: Term, base: Tensor) -> Iterator[Quantised]:
        for tau in _pieces(term, base):
            scale = tau.abs().amax(dim=1) / 127
            steps = tau / torch.where(scale > 0, scale, 1)[:, None]  # a row of zeros has the scale 0
            yield Quantised(steps.round().to(torch.int8), scale)


@dataclass(frozen=True)
class Ternary(Quantise):
    """2 bits per weight: the signs of the largest entries, and one scale per matrix.

    ComPEFT (arXiv 2311.13171) ranks and scales over the whole task vector, and tunes the scale on labelled
    data; here both are per matrix, and the scale is the mean magnitude of the kept entries, which is the
    least-squares fit. Learned coefficients compensate for the rest.

    Args:
        density: Fraction of entries to keep, in (0, 1]; ComPEFT tries 0.05 to 0.5.
    """

    density: float = 0.2

    def __post_init__(self) -> None:
        check_fields(self, density="(0, 1]")

    @property
    @override
    def bytes_per_weight(self) -> float:
        return 1 / PER_BYTE

    @override
    def width(self, width: int) -> int:
        return -(-width // PER_BYTE)

    @override
    def scales(self, rows: int) -> int:
        return 1

    @override
    def __call__(self, term: Term, base: Tensor) -> Iterator[Quantised]:
        kept = count(base.numel(), self.density)
        (cut,) = cuts(lambda: (tau.view(1, -1) for tau in _pieces(term, base)), kept)
        total = sum(float(tau.abs().double()[tau.abs() > cut.value].sum()) for tau in _pieces(term, base))
        scale = torch.tensor([(total + cut.value * cut.ties) / kept])
        for tau in _pieces(term, base):
            yield Quantised(pack_codes(cut(tau).sign().to(torch.int8)), scale)


def _pieces(term: Term, base: Tensor) -> Iterator[Tensor]:
    """One expert's difference, [R, W] float32 rows at a time.

    Raises:
        ValueError: it is not finite.
    """
    delta = Delta(base, (term,))
    rows = max(1, PIECE // base[0].numel())
    for first in range(0, len(base), rows):
        part = delta.rows(slice(first, first + rows))
        tau = dense_term(part.terms[0], part.base).flatten(1).float()
        if not bool(tau.isfinite().all()):
            raise ValueError("a task vector is not finite: it cannot be quantised")
        yield tau


def quantised(task_vectors: TaskVectors, method: Quantise, folder: Path, inputs: str) -> TaskVectors:
    """The task vectors with quantised matrices, written once to `folder` and mapped.

    `inputs` identifies what the task vectors were made from; with the method's fields it names the file.
    """

    def make(path: Path) -> None:
        specs = _specs(task_vectors, method)
        write_safetensors(path, specs, _tensors(task_vectors, method), {"method": repr(method)})

    file = cached(folder / f"quantised-{digest(f'{inputs} {method!r}')}.safetensors", make)
    deltas = {
        name: replace(
            delta, terms=tuple(_mapped(file, _key(name, k), term) for k, term in enumerate(delta.terms))
        )
        for name, delta in task_vectors.deltas.items()
    }
    return TaskVectors(task_vectors.experts, deltas)


def _dense(task_vectors: TaskVectors) -> Iterator[tuple[str, Term, Tensor]]:
    """The matrices to quantise: key, term, base."""
    for name, delta in task_vectors.deltas.items():
        for k, term in enumerate(delta.terms):
            if delta.base.dim() > 1 and isinstance(term, Difference | ExpertWeight):
                yield _key(name, k), term, delta.base


def _specs(task_vectors: TaskVectors, method: Quantise) -> Specs:
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    dtype = torch.int8 if method.bytes_per_weight == 1 else torch.uint8
    for key, _, base in _dense(task_vectors):
        specs[key] = (dtype, (len(base), method.width(base[0].numel())))
        specs[f"{key}.scale"] = (torch.float32, (method.scales(len(base)),))
    return specs


def _tensors(task_vectors: TaskVectors, method: Quantise) -> Iterator[tuple[str, Tensor]]:
    for key, term, base in _dense(task_vectors):
        scales = []
        for piece in method(term, base):
            yield key, piece.codes
            scales.append(piece.scale)
        yield f"{key}.scale", torch.cat(scales)[: method.scales(len(base))]


def _mapped(file: MappedFile, key: str, term: Term) -> Term:
    return Quantised(file.read(key), file.read(f"{key}.scale")) if key in file.tensors else term


def _key(name: str, expert: int) -> str:
    return f"{expert}/{name}"
