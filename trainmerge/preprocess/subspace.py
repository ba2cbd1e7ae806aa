"""The experts' shared subspace, off which gradients are projected.

Wei et al., ICML 2025 (arXiv 2501.01230).

Legend: `K` experts, `m x n` a matrix, `k` directions.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from trainmerge.preprocess.spectrum import truncated
from trainmerge.system.safetensors_file import write_safetensors
from trainmerge.system.workspace import cached, digest
from trainmerge.task_vectors.delta import Delta, TaskVectors, project_out
from trainmerge.task_vectors.roles import Role


def shared_subspace(taus: Tensor, directions: int) -> Tensor:
    """Orthonormal columns [m, k]: leading left singular vectors of the experts' leading ones."""
    rank = min(taus.shape[1:]) // len(taus)
    leading = torch.cat([truncated(tau, rank)[0] for tau in taus], dim=1)
    return truncated(leading, directions)[0]


def shared_subspaces(task_vectors: TaskVectors, divisor: int, folder: Path, inputs: str) -> dict[str, Tensor]:
    """Every matrix's shared subspace of floor(min(m, n) / divisor) directions, [m, k], mapped from `folder`.

    m are the outputs, in either orientation. A stack of matrices has [E, m, k]; shorter bases end in zeros.
    `inputs` identifies the task vectors. Matrices whose subspace is empty are left out. K + 1 singular value
    decompositions per matrix, once.
    """

    def make(path: Path) -> None:
        found: dict[str, Tensor] = {}
        for name, delta in task_vectors.deltas.items():
            if delta.matrices:
                basis = _basis(delta, min(delta.shape[-2:]) // divisor)
                found |= {name: basis.contiguous()} if basis.shape[-1] else {}
        specs = {name: (basis.dtype, tuple(basis.shape)) for name, basis in found.items()}
        write_safetensors(path, specs, found.items())

    file = cached(folder / f"subspaces-{digest(f'{inputs} {divisor} outputs')}.safetensors", make)
    return {name: file.read(name) for name in file.tensors}


def _basis(delta: Delta, directions: int) -> Tensor:
    taus = delta.dense()
    turned = taus.mT if delta.role == "transposed" else taus
    if taus.dim() == 3:
        return shared_subspace(turned, directions)
    bases = [shared_subspace(matrix, directions) for matrix in turned.unbind(dim=1)]
    width = max(basis.shape[1] for basis in bases)
    return torch.stack([pad(basis, (0, width - basis.shape[1])) for basis in bases])


def outside_subspace(gradient: Tensor, basis: Tensor | None, role: Role) -> Tensor:
    """A weight's gradient without its part in the subspace of the layer's outputs, if there is one."""
    if basis is None:
        return gradient
    wide, basis = gradient.to(basis.dtype), basis.to(gradient.device)
    return project_out(wide.mT, basis).mT.contiguous() if role == "transposed" else project_out(wide, basis)
