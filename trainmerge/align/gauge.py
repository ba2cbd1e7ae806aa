"""Undo changes of gauge in attention: invertible matrices between query and key, and value and output.

Legend: `G` key heads, `d` size of a head, `r` query heads of a group, `D` hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.align.base import Align
from trainmerge.align.pair import Pair
from trainmerge.align.products import changes, is_locked
from trainmerge.align.unit_map import UnitMap
from trainmerge.system.ranges import check_fields

STEPS = 50
LEAST = 1e-9  # relative decrease of the squared distance, below which the descent stops


@dataclass(frozen=True)
class Gauge(Align):
    """Undo what locks an expert against merging (MergeLock; Model Unmerging, arXiv 2509.01548).

    W_Q -> A W_Q with W_K -> A^-T W_K, and W_V -> C W_V with W_O -> W_O C^-1, leave attention unchanged and
    make a merge useless. Per key head, B minimises ||B Q - Q_0||^2 + ||B^-T K - K_0||^2, from (Q Q_0^+)^-1,
    and the same for values and output. Under rotary positions B is a rotation and a scale per pair
    (j, j + d/2); behind norms of queries and keys only values and output are changed.

    Args:
        always: Also where the factors and their product changed alike, as training changes them.
    """

    stage: ClassVar[int] = 3
    repeated: ClassVar[bool] = False

    always: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "Gauge")

    @override
    def __call__(self, pair: Pair) -> Mapping[str, UnitMap]:
        found: dict[str, UnitMap] = {}
        for layer in pair.anatomy.layers:
            if pair.anatomy.gauges != "none":
                found |= self._of(pair, layer, "query", "key", pair.anatomy.gauges == "rotary")
            found |= self._of(pair, layer, "output", "value", False)
        return found

    def _of(self, pair: Pair, layer: str, left: str, right: str, rotary: bool) -> dict[str, UnitMap]:
        """The maps of two factors of one layer; none if they need no change."""
        H, G = pair.anatomy.heads, pair.anatomy.shared
        q, q0 = (pair.rows(read, layer, left) for read in (pair.aligned, pair.base))
        k, k0 = (pair.rows(read, layer, right) for read in (pair.aligned, pair.base))
        if not self.always and not is_locked(*changes(q0, k0, q, k, H, G)):
            return {}
        own, own0 = _stacked(q, H, G), _stacked(q0, H, G)
        matrices = unlock(own, own0, _stacked(k, G, G), _stacked(k0, G, G), rotary)
        inverse = torch.linalg.inv(matrices).mT
        return {
            f"{layer} {left}": UnitMap(torch.arange(H), matrices.repeat_interleave(H // G, 0)),
            f"{layer} {right}": UnitMap(torch.arange(G), inverse),
        }


def _stacked(rows: Tensor, heads: int, shared: int) -> Tensor:
    """The rows [H d, D] of a group's heads side by side: [G, d, r D]."""
    split = rows.reshape(shared, heads // shared, rows.shape[0] // heads, -1)
    return split.transpose(1, 2).flatten(2)


def unlock(q: Tensor, q0: Tensor, k: Tensor, k0: Tensor, rotary: bool) -> Tensor:
    """B [G, d, d] with the least ||B q - q0||^2 + ||B^-T k - k0||^2, by Gauss-Newton from (q q0^+)^-1.

    Args:
        q: The expert's left factor [G, d, r D], float64.
        q0: The base's.
        k: The expert's right factor [G, d, D].
        k0: The base's.
        rotary: B is a rotation and a scale per pair (j, j + d/2).
    """
    if rotary:
        z, z0 = _complex(q), _complex(q0)
        B = rotation_and_scale((z0 * z.conj()).sum(-1) / (z * z.conj()).sum(-1))
    else:
        B = torch.linalg.inv(q @ q0.mT @ torch.linalg.pinv(q0 @ q0.mT))
    eye, best = torch.eye(q.shape[1], dtype=q.dtype), float("inf")
    found = step = B
    for _ in range(STEPS):
        q, k = step @ q, torch.linalg.inv(step).mT @ k
        distance = float((q - q0).square().sum() + (k - k0).square().sum())
        if not distance < best * (1 - LEAST):
            break
        found, best = B, distance
        step = eye + (rotation_and_scale(_rotary_step(q, q0, k, k0)) if rotary else _step(q, q0, k, k0))
        B = step @ B
    return found


def _step(q: Tensor, q0: Tensor, k: Tensor, k0: Tensor) -> Tensor:
    """E with the least ||(1 + E) q - q0||^2 + ||(1 - E^T) k - k0||^2: E q q^T + k k^T E = R."""
    right = (q0 - q) @ q.mT + k @ (k - k0).mT
    a, U = torch.linalg.eigh(q @ q.mT)
    b, V = torch.linalg.eigh(k @ k.mT)
    E: Tensor = V @ ((V.mT @ right @ U) / (b[:, :, None] + a[:, None, :])) @ U.mT
    return E


def _rotary_step(q: Tensor, q0: Tensor, k: Tensor, k0: Tensor) -> Tensor:
    """The same for one complex number per pair; [G, d/2]."""
    z, z0, y, y0 = (_complex(one) for one in (q, q0, k, k0))
    right = ((z0 - z) * z.conj()).sum(-1) + ((y - y0).conj() * y).sum(-1)
    return right / ((z * z.conj()).sum(-1) + (y * y.conj()).sum(-1))


def _complex(rows: Tensor) -> Tensor:
    """Rows j and j + d/2 as one complex row: [G, d, D] -> [G, d/2, D]."""
    real, imaginary = rows.chunk(2, dim=1)
    return torch.complex(real, imaginary)


def rotation_and_scale(numbers: Tensor) -> Tensor:
    """Complex numbers [G, d/2] as matrices [G, d, d] on pairs (j, j + d/2)."""
    real, imaginary = torch.diag_embed(numbers.real), torch.diag_embed(numbers.imag)
    return torch.cat([torch.cat([real, -imaginary], 2), torch.cat([imaginary, real], 2)], 1)
