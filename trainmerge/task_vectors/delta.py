"""Task vectors: the experts' differences from the base, per parameter, on disk until a pass reads them.

Legend: `K` experts, `C` chunks of one parameter, `*S` parameter shape.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainmerge.kernels import (
    Difference,
    ExpertWeight,
    LowRank,
    Merge,
    Product,
    Quantised,
    Term,
    Untouched,
    accumulation_dtype,
    bytes_read,
    inner_products,
    rows_of,
    weighted_sum,
)
from trainmerge.kernels.quantised import dequantise
from trainmerge.task_vectors.roles import Role, num_matrices
from trainmerge.task_vectors.state_dicts import Compared, StateDict, compare_state_dicts


@dataclass(frozen=True)
class Delta:
    """One parameter's base and K differences. No data is read before a method is called."""

    base: Tensor  # [*S], usually mapped from a file
    terms: tuple[Term, ...]  # one per expert
    role: Role = ""  # what it is in its layer

    @property
    def shape(self) -> torch.Size:
        """The parameter's shape, [*S]."""
        return self.base.shape

    @property
    def matrices(self) -> int:
        """1 for a matrix, E for a stack of matrices [E, *, *], 0 for everything else."""
        return num_matrices(self.base.shape, self.role)

    @property
    def nbytes(self) -> int:
        """Bytes of base and terms that a pass reads."""
        return bytes_read(self.base, self.terms)

    def merge(self, out: Tensor, coefficients: Tensor) -> None:
        """Write base + sum_k coefficients[k, chunk] tau_k into `out` [*S]. Coefficients [K, C]."""
        weighted_sum(out, self.base, self.terms, coefficients)

    def inner(self, grad: Tensor, chunks: int) -> Tensor:
        """<grad, tau_k> per chunk of rows -> [K, C], float32 or wider."""
        return inner_products(grad, self.base, self.terms, chunks)

    def merges(self, out: Tensor, coefficients: Tensor) -> Iterator[Merge]:
        """The kernel calls of `merge`."""
        yield Merge(out, self.base, self.terms, coefficients)

    def products(self, grad: Tensor, chunks: int) -> Iterator[tuple[slice, Product]]:
        """The kernel calls of `inner`, and the chunks of each."""
        yield slice(0, chunks), Product(grad, self.base, self.terms, chunks)

    def dense(self) -> Tensor:
        """The K differences themselves, [K, *S] in float32 or wider: for preprocessing and tests."""
        base = self.base.to(accumulation_dtype(self.base.dtype))  # once for all of them
        taus = torch.empty(len(self.terms), *base.shape, dtype=base.dtype, device=base.device)
        for tau, term in zip(taus, self.terms, strict=True):
            if isinstance(term, ExpertWeight):
                tau.copy_(term.weight).sub_(base)
            else:
                tau.copy_(dense_term(term, base))
        return taus

    def rows(self, part: slice) -> "Delta":
        """The same for these rows of dimension 0: views, no data is read."""
        return Delta(self.base[part], tuple(rows_of(term, part) for term in self.terms), self.role)


def dense_term(term: Term, base: Tensor) -> Tensor:
    """One expert's difference, [*S], in float32 (float64 for a float64 base)."""
    dtype = accumulation_dtype(base.dtype)
    match term:
        case Difference(tau):
            return tau.to(dtype)
        case ExpertWeight(weight):
            return weight.to(dtype) - base.to(dtype)
        case LowRank(up, down, scale):
            return (scale * up.to(dtype) @ down.to(dtype)).view(base.shape)
        case Quantised():
            wide = torch.empty(len(base), base[0].numel(), dtype=dtype, device=base.device)
            return dequantise(term, slice(None), wide).view(base.shape)
        case Untouched():
            return torch.zeros_like(base, dtype=dtype)


def project_out(matrix: Tensor, basis: Tensor) -> Tensor:
    """Its projection off the subspace, without forming the m x m projector."""
    return matrix - basis @ (basis.mT @ matrix)


@dataclass(frozen=True)
class TaskVectors:
    """Every parameter that some expert changed, under the base checkpoint's names."""

    experts: tuple[str, ...]  # K names, in coefficient order
    deltas: Mapping[str, Delta]

    def __post_init__(self) -> None:
        if isinstance(self.experts, Mapping) or not all(isinstance(d, Delta) for d in self.deltas.values()):
            raise TypeError(
                "TaskVectors takes the experts' names and one Delta per parameter; for state dicts use "
                "TaskVectors.from_state_dicts(base, {name: state_dict})"
            )

    @staticmethod
    def from_state_dicts(
        base: StateDict,
        experts: Mapping[str, StateDict],
        *,
        ignore: Sequence[str] = (),
        buffers: Collection[str] = (),
        roles: Mapping[str, Role] | None = None,
    ) -> "TaskVectors":
        """The task vectors of state dicts of one architecture. Nothing is copied, except from a GPU.

        Args:
            base: The state dict that the experts were fine-tuned from.
            experts: Name -> state dict.
            ignore: fnmatch patterns of tensors that are neither compared nor merged: an expert's own head.
            buffers: Names of further buffers, which are not merged. The statistics of batch norms
                (`running_mean`, `running_var`) are known by name.
            roles: Parameter -> what it is in its layer, for methods that treat layers differently; by default
                two dimensions are outputs x inputs.

        Raises:
            ValueError: lists every difference of names, shapes and kinds.
        """
        return TaskVectors.of_compared(base, compare_state_dicts(base, experts, ignore, buffers), roles or {})

    @staticmethod
    def of_compared(base: StateDict, found: Compared, roles: Mapping[str, Role]) -> "TaskVectors":
        """`from_state_dicts` after its comparison."""
        deltas = {
            name: Delta(
                base[name].detach().cpu(),
                tuple(ExpertWeight(own[name].cpu()) for own in found.experts.values()),
                roles.get(name, ""),
            )
            for name in found.parameters
        }
        return TaskVectors(tuple(found.experts), deltas)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Parameter name -> shape."""
        return {name: delta.shape for name, delta in self.deltas.items()}

    def replaced(self, taus: Mapping[str, Sequence[Tensor]]) -> "TaskVectors":
        """The same experts and bases, with the given differences of some parameters, K tensors [*S] each."""
        deltas = {
            name: replace(delta, terms=tuple(Difference(tau) for tau in taus[name]))
            if name in taus
            else delta
            for name, delta in self.deltas.items()
        }
        return TaskVectors(self.experts, deltas)
