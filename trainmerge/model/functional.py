"""The merge inside the autograd graph: slow and simple, the reference for tests of the resident merge.

For training loops of your own: `torch.func.functional_call(model, merged_weights(...), inputs)`.
Not compatible with activation checkpointing, whose recomputation would use the base's weights.

Legend: `K` experts, `C` chunks of one parameter, `*S` parameter shape.
"""

import torch
from torch import Tensor

from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.kernels import accumulation_dtype, chunk_bounds
from trainmerge.task_vectors.delta import Delta, TaskVectors


def merged_weights(task_vectors: TaskVectors, coefficients: Coefficients) -> dict[str, Tensor]:
    """Every merged parameter, base + sum_k c_k tau_k, differentiable in the coefficients."""
    values = coefficients()
    return {
        name: merged_weight(task_vectors.deltas[name], coefficients.of(name, values))
        for name in coefficients.layout.groups
    }


def merged_weight(delta: Delta, coefficients: Tensor) -> Tensor:
    """One parameter, [*S] in the base's dtype; coefficients [K, C]."""
    dtype = accumulation_dtype(delta.base.dtype)
    rows = delta.shape[0] if delta.shape else 1
    bounds = torch.tensor(chunk_bounds(rows, coefficients.shape[1]), device=coefficients.device)
    per_row = coefficients.to(dtype).repeat_interleave(bounds.diff(), dim=1)  # [K, rows]
    taus = delta.dense().reshape(len(delta.terms), rows, -1)
    merged = delta.base.to(dtype).reshape(rows, -1) + torch.einsum("kr,krw->rw", per_row, taus)
    return merged.view(delta.shape).to(delta.base.dtype)
