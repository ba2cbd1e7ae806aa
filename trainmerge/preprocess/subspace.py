"""The experts' shared subspace, off which gradients are projected.

Wei et al., ICML 2025 (arXiv 2501.01230).

Legend: `K` experts, `m x n` a matrix, `k` directions.
"""

from pathlib import Path

import torch
from torch import Tensor

from trainmerge.preprocess.spectrum import truncated
from trainmerge.system.safetensors_file import write_safetensors
from trainmerge.system.workspace import cached, digest
from trainmerge.task_vectors.delta import TaskVectors


def shared_subspace(taus: Tensor, directions: int) -> Tensor:
    """Orthonormal columns [m, k]: leading left singular vectors of the experts' leading ones."""
    rank = min(taus.shape[1:]) // len(taus)
    leading = torch.cat([truncated(tau, rank)[0] for tau in taus], dim=1)
    return truncated(leading, directions)[0]


def shared_subspaces(task_vectors: TaskVectors, divisor: int, folder: Path, inputs: str) -> dict[str, Tensor]:
    """Every matrix's shared subspace of floor(min(m, n) / divisor) directions, [m, k], mapped from `folder`.

    `inputs` identifies the task vectors. Matrices whose subspace is empty are left out. K + 1 singular value
    decompositions per matrix, once.
    """

    def make(path: Path) -> None:
        found: dict[str, Tensor] = {}
        for name, delta in task_vectors.deltas.items():
            if len(delta.shape) == 2:
                basis = shared_subspace(delta.dense(), min(delta.shape) // divisor)
                found |= {name: basis.contiguous()} if basis.shape[1] else {}
        specs = {name: (basis.dtype, tuple(basis.shape)) for name, basis in found.items()}
        write_safetensors(path, specs, found.items())

    file = cached(folder / f"subspaces-{digest(f'{inputs} {divisor}')}.safetensors", make)
    return {name: file.read(name) for name in file.tensors}
