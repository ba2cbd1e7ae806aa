"""What a parameter is in its layer, which tells outputs from inputs. Read from the modules once, at load.

Legend: `K` experts, `E` matrices in one parameter, `m x n` a matrix (outputs x inputs).
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

# linear       the last two dimensions are outputs x inputs (nn.Linear, experts of most mixtures)
# transposed   inputs x outputs (transformers' Conv1D, experts of gpt-oss and Llama 4)
# embedding    one row per token or position
# convolution  outputs x inputs x kernel
# vector       norms and biases, also a stack of them: one row per expert of a mixture
# flat         several matrices, one above the other, in two dimensions (DBRX's experts)
# other        a parameter of none of these modules
# ""           nobody asked a module: two dimensions are outputs x inputs, three a stack of such matrices
Role = Literal["linear", "transposed", "embedding", "convolution", "vector", "flat", "other", ""]
LINEAR = ("linear", "transposed")


def num_matrices(shape: Sequence[int], role: Role = "") -> int:
    """1 for a matrix, E for a stack of matrices [E, *, *], 0 for everything else.

    >>> [num_matrices(shape) for shape in ((4,), (4, 3), (5, 4, 3), (1, 4, 3), (5, 4, 1, 3))]
    [0, 1, 5, 0, 0]
    >>> num_matrices((1, 4, 3), "linear"), num_matrices((5, 4, 3), "convolution")
    (1, 0)
    """
    if role in ("convolution", "vector", "flat"):
        return 0
    if len(shape) == 2:
        return 1
    # unasked, [1, n, d] are positions or a class token, and [E, 1, d] are vectors
    stacked = len(shape) == 3 and (role in LINEAR or (not role and min(shape) > 1))
    return shape[0] if stacked else 0


def each_matrix(taus: Tensor, role: Role, method: Callable[[Tensor], Tensor]) -> Tensor:
    """`method` of the differences [K, m, n] of each matrix in [K, (E,) *, *]; the same shape."""
    flip = role == "transposed"
    turned = taus.mT.contiguous() if flip else taus
    if taus.dim() == 3:
        results = method(turned)
    else:
        results = torch.stack([method(turned[:, e]) for e in range(turned.shape[1])], dim=1)
    return results.mT.contiguous() if flip else results
