"""Another method in a small space that holds all experts: KnOTS and core space, for low-rank experts.

KnOTS: Stoica et al., ICLR 2025 (arXiv 2410.19735). Core space: Panariello et al., NeurIPS 2025 (arXiv
2509.17786).

Legend: `K` experts, `m x n` a matrix, `r` directions that all experts together have.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.kernels import Difference, LowRank, Term, Untouched
from trainmerge.preprocess.base import Informed, Preprocess
from trainmerge.preprocess.spectrum import truncated
from trainmerge.preprocess.ties import Ties
from trainmerge.preprocess.tsv import Tsv
from trainmerge.system.ranges import check_fields
from trainmerge.task_vectors.delta import Delta, TaskVectors, dense_term
from trainmerge.task_vectors.roles import Role


class Space(NamedTuple):
    """Orthonormal columns that span all experts of one matrix; None is the whole side."""

    outputs: Tensor  # [m, r] float64
    inputs: Tensor | None  # [n, r]

    def inside(self, tau: Tensor) -> Tensor:
        """The coordinates of a difference [m, n]."""
        rows = self.outputs.T @ tau.double()
        return (rows if self.inputs is None else rows @ self.inputs).to(tau.dtype)

    def outside(self, coordinates: Tensor) -> Tensor:
        """Undo `inside`, for any coordinates."""
        rows = self.outputs @ coordinates.double()
        return (rows if self.inputs is None else rows @ self.inputs.T).to(coordinates.dtype)


@dataclass(frozen=True)
class Around(Preprocess):
    """Gives an inner method other task vectors, and changes its results; it applies where that one does."""

    method: Preprocess

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.method, Informed):
            raise ValueError(f"{type(self).__name__}.method must be a method without data")

    @override
    def applies_to(self, name: str, delta: Delta) -> bool:
        return self.method.applies_to(name, delta)

    @override
    def otherwise_is(self) -> str:
        return self.method.otherwise_is()


@dataclass(frozen=True)
class InSpace(Around):
    """Apply `method` to the experts' coordinates in a space that holds all of them; map its results back.

    Nothing is lost on the way: a method that changes nothing gives the task vectors again. Parameters that
    are no matrices go to the method as they are. Coordinates of all parameters are in memory at once, which
    is little for low-rank experts, and as much as all experts for full ones.
    """

    @abstractmethod
    def space(self, terms: tuple[Term, ...], base: Tensor) -> Space:
        """The space of one matrix's differences."""

    @override
    def __call__(self, task_vectors: TaskVectors) -> Iterator[tuple[str, Tensor]]:
        spaces: dict[str, list[Space]] = {}
        deltas: dict[str, Delta] = {}
        for name, delta in task_vectors.deltas.items():
            if not delta.matrices:
                deltas[name] = delta
                continue
            parts = list(matrices_of(delta))
            spaces[name] = [self.space(part.terms, part.base) for part in parts]
            for number, (part, space) in enumerate(zip(parts, spaces[name], strict=True)):
                inner = [space.inside(dense_term(term, part.base)) for term in part.terms]
                terms = tuple(Difference(tau) for tau in inner)
                deltas[f"{name}#{number}"] = Delta(torch.zeros_like(inner[0]), terms, turned_role(delta))
        results = iter(self.method(TaskVectors(task_vectors.experts, deltas)))
        for name, delta in task_vectors.deltas.items():
            if name in spaces:
                yield name, _back(spaces[name], [next(results)[1] for _ in spaces[name]], delta)
            else:
                yield name, next(results)[1]


@dataclass(frozen=True)
class Knots(InSpace):
    """KnOTS: the method sees U^T tau_k, U the left singular vectors of all experts side by side.

    KnOTS-TIES is the default; its merge is base + coefficient x sum of the results, where the paper tunes the
    coefficient, 1 for `Ties(merge="mean")`.

    Args:
        method: The method, `Ties` or `Dare` in the paper.
    """

    method: Preprocess = field(default_factory=lambda: Ties(0.3, merge="mean"))

    @override
    def space(self, terms: tuple[Term, ...], base: Tensor) -> Space:
        return Space(_basis([_left(term, base) for term in terms]), None)


@dataclass(frozen=True)
class CoreSpace(InSpace):
    """Core space: the method sees the cores U^T tau_k V, r x r numbers per expert.

    U and V are the singular vectors of all experts' B side by side, and of all A one above the other. For
    full experts the differences themselves take the place of both. The coefficient is the method's own.

    Args:
        method: The method, any without data that does not look at the base.
    """

    method: Preprocess = field(default_factory=Tsv)

    @override
    def space(self, terms: tuple[Term, ...], base: Tensor) -> Space:
        factors = [factors_of(term, base) for term in terms]
        return Space(_basis([up for up, _ in factors]), _basis([down.T for _, down in factors]))


def _basis(parts: list[Tensor]) -> Tensor:
    """Left singular vectors of matrices [m, *] side by side, [m, r] float64; one at least."""
    u = truncated(torch.cat(parts, dim=1).double(), sum(part.shape[1] for part in parts))[0]
    return u if u.shape[1] else torch.eye(len(u), 1, dtype=torch.float64)


def factors_of(term: Term, base: Tensor) -> tuple[Tensor, Tensor]:
    """[m, *] and [*, n], which span a difference's columns and rows."""
    if isinstance(term, Untouched):
        return base.new_zeros(len(base), 1), base.new_zeros(1, base.shape[1])
    if isinstance(term, LowRank):
        return term.scale * term.up.double(), term.down.double()
    tau = dense_term(term, base)
    return tau, tau


def _left(term: Term, base: Tensor) -> Tensor:
    """[m, *] with a difference's left singular vectors and values; a low-rank one is not formed."""
    up, down = factors_of(term, base)
    return up @ torch.linalg.qr(down.T)[1].T if isinstance(term, LowRank) else up


def matrices_of(delta: Delta) -> Iterator[Delta]:
    """Each matrix of a parameter, outputs x inputs."""
    if len(delta.shape) == 2 and delta.role != "transposed":
        yield delta
        return
    taus = delta.dense().view(len(delta.terms), -1, *delta.shape[-2:])
    turned = taus.mT if delta.role == "transposed" else taus
    for number in range(turned.shape[1]):
        own = turned[:, number].contiguous()
        yield replace(delta, base=torch.zeros_like(own[0]), terms=tuple(Difference(tau) for tau in own))


def turned_role(delta: Delta) -> Role:
    """The role of each of `matrices_of`, which are outputs x inputs."""
    return "linear" if delta.role == "transposed" else delta.role


def _back(spaces: list[Space], results: list[Tensor], delta: Delta) -> Tensor:
    """One parameter's results, [K, *S]."""
    pairs = zip(spaces, results, strict=True)
    taus = torch.stack([torch.stack([space.outside(own) for own in part]) for space, part in pairs], dim=1)
    turned = taus.mT if delta.role == "transposed" else taus
    return turned.reshape(len(taus), *delta.shape).contiguous()
