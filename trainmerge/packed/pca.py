"""A mean and p directions for all tasks, and p + 1 numbers for each (RMM, arXiv 2510.14163).

tau_t = z_t0 mu + sum_j z_tj b_j, per tensor: the principal components of the K differences. The paper fixes
z_t0 = 1. All numbers are those of least squares for mu and b as they are stored. p = K - 1 is exact up to the
rounding of mu and b.

Legend: `K` tasks, `R` rows, `W` entries of a row, `p` basis vectors.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.packed.codec import Codec, EncodedParameter
from trainmerge.packed.parameter import Parameter
from trainmerge.system.ranges import check_fields


@dataclass(frozen=True)
class Pca(Codec):
    """Mean and principal components.

    Args:
        components: p, at most K - 1.
    """

    components: int = 1

    def __post_init__(self) -> None:
        check_fields(self, "pca", components="[1, inf)")

    @property
    @override
    def name(self) -> str:
        return "pca"

    @override
    def encode(self, parameter: Parameter) -> EncodedParameter:
        mixing = _mixing(_moments(parameter, lambda _, taus: taus), self.components)
        basis = torch.empty(len(mixing), *parameter.shape, dtype=self.dtype)
        for part, taus in parameter.blocks():
            basis[:, part] = torch.einsum("pk,krw->prw", mixing, taus.double()).to(self.dtype)
        gram = _moments(parameter, lambda part, taus: torch.cat([taus, basis[:, part].to(taus.dtype)]))
        tasks = parameter.tasks
        # Least squares by the basis's own products; the pseudo-inverse leaves out directions without length.
        places = torch.linalg.pinv(gram[tasks:, tasks:], hermitian=True) @ gram[tasks:, :tasks]
        own = ({"z": z.float().contiguous()} for z in places.T)
        return EncodedParameter({"b": basis}, tuple(own), torch.ones(tasks))


def _moments(parameter: Parameter, rows: Callable[[slice, Tensor], Tensor]) -> Tensor:
    """All inner products of some vectors, which are read block by block: [n, n] float64."""
    total: Tensor | float = 0.0
    for part, taus in parameter.blocks():
        flat = rows(part, taus).double().flatten(1)
        total = total + flat @ flat.T
    assert isinstance(total, Tensor)
    return total


def _mixing(gram: Tensor, components: int) -> Tensor:
    """The weights of the K differences in mean and components, [p + 1, K] float64.

    Components have the mean's length or less; one without length is left out.
    """
    tasks = len(gram)
    centre = torch.eye(tasks, dtype=torch.float64) - 1 / tasks
    values, vectors = torch.linalg.eigh(centre @ gram @ centre)
    chosen = [k for k in range(tasks - 1, -1, -1) if values[k] > 1e-12 * max(float(gram.trace()), 1e-300)]
    directions = [centre @ vectors[:, k] for k in chosen[: min(components, tasks - 1)]]
    return torch.stack([torch.full((tasks,), 1 / tasks, dtype=torch.float64), *directions])
