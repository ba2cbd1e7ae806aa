"""Orders of attention heads, compared by what no change of gauge moves: W_Q^T W_K and W_O W_V.

Legend: `H` query heads, `G` key heads, r = H / G query heads in a group, `d` size of a head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.align.base import Align, better, nearest_order
from trainmerge.align.pair import Pair
from trainmerge.align.unit_map import UnitMap


@dataclass(frozen=True)
class AttentionHeads(Align):
    """The heads of each attention layer in the order that is nearest to the base's.

    With grouped queries, key and value heads move with the queries of their group, and queries inside their
    group. Heads are compared by the products of their matrices: ||W_Q^T W_K - W_Q0^T W_K0||^2 and the same of
    W_O W_V, so a locked expert's heads are found too. Exact for the function.
    """

    stage: ClassVar[int] = 1
    units: ClassVar[str] = "heads"

    @override
    def __call__(self, pair: Pair) -> Mapping[str, UnitMap]:
        found: dict[str, UnitMap] = {}
        for layer in pair.anatomy.layers:
            queries, keys, after, before = _orders(_similarity(pair, layer), pair.anatomy.shared)
            if better(after, before):
                found |= {f"{layer} {kind}": UnitMap(queries) for kind in ("query", "output")}
                found |= {f"{layer} {kind}": UnitMap(keys) for kind in ("key", "value")}
        return found


def _similarity(pair: Pair, layer: str) -> Tensor:
    """<M_0,a, M_k,b> of the products M of the base's heads a and the expert's b; [H, H] float64."""
    H, G = pair.anatomy.heads, pair.anatomy.shared
    total = torch.zeros(H, H, dtype=torch.float64)
    group = torch.arange(H) // (H // G)
    for own, other in (("query", "key"), ("output", "value")):
        q0, k0 = (_split(pair.rows(pair.base, layer, kind), n) for kind, n in ((own, H), (other, G)))
        q, k = (_split(pair.rows(pair.aligned, layer, kind), n) for kind, n in ((own, H), (other, G)))
        for a in range(H):  # never H x H products of d x d at once
            keys = torch.einsum("if,bjf->bij", k0[group[a]], k)[group]
            total[a] += (torch.einsum("if,bjf->bij", q0[a], q) * keys).sum((1, 2))
    return total


def _split(rows: Tensor, units: int) -> Tensor:
    return rows.reshape(units, -1, rows.shape[-1])


def _orders(similarity: Tensor, shared: int) -> tuple[Tensor, Tensor, float, float]:
    """Orders of queries [H] and keys [G], and the sums of inner products with and without them."""
    size = len(similarity) // shared
    blocks = similarity.reshape(shared, size, shared, size).transpose(1, 2)  # [G, G, r, r]
    inside = [[nearest_order(block) for block in row] for row in blocks]
    values = torch.tensor([[own[1] for own in row] for row in inside], dtype=torch.float64)
    keys, after, _ = nearest_order(values)
    queries = torch.cat([int(key) * size + inside[i][int(key)][0] for i, key in enumerate(keys)])
    return queries, keys, after, float(similarity.diagonal().sum())
