"""The authors' code of some methods, written out from its description, and how far ours is from it.

`python -m tests.preprocess.published` prints the figures of the page of methods. Inputs are three experts of
48 x 64 entries with standard deviation 1e-3, of full rank or of rank 4 (as LoRA trains them).

Legend: `K` experts, `m x n` a matrix.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import trainmerge as tm
from tests.methods import matrices, one

SIZE, RANK = 1e-3, 4


def experts(low_rank: bool = False) -> Tensor:
    """[3, 48, 64]."""
    if not low_rank:
        return SIZE * torch.stack(matrices(0, 1, 2, shape=(48, 64)))
    up, down = matrices(0, 1, 2, shape=(48, RANK)), matrices(3, 4, 5, shape=(RANK, 64))
    return SIZE * torch.stack([u @ d for u, d in zip(up, down, strict=True)]) / RANK**0.5


def leading(tau: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` leading singular triples: U [m, r], S [r], V^T [r, n]; zero ones have arbitrary vectors."""
    u, s, v = torch.linalg.svd(tau, full_matrices=False)
    return u[:, :rank], s[:rank], v[:rank]


def descended(start: Tensor, slope: Callable[[Tensor], Tensor], optimizer: Callable[..., object]) -> Tensor:
    """300 steps of an optimizer on one matrix."""
    merged = torch.nn.Parameter(start.clone())
    steps = optimizer([merged])
    for _ in range(300):
        merged.grad = slope(merged.detach())
        steps.step()
    return merged.detach()


def adam(rate: float) -> Callable[..., object]:
    return partial(torch.optim.Adam, lr=rate)


def wudi(taus: Tensor) -> Tensor:
    """MLLMerging's `wudi_merging`: 300 steps of Adam, rate 1e-5, from the sum."""
    sizes = taus.square().sum((1, 2))

    def slope(merged: Tensor) -> Tensor:
        return sum(2 * (merged - t) @ t.T @ t / s for t, s in zip(taus, sizes, strict=True))

    return descended(taus.sum(0), slope, adam(1e-5))


def optmerge(taus: Tensor, low_rank: bool) -> Tensor:
    """`wudi_merging2`: Adam from the sum; for low-rank experts SGD from the mean, with uncentred targets."""
    mean, rank, sizes = taus.mean(0), min(taus.shape[1:]) // len(taus), taus.square().sum((1, 2))
    targets, seen = [], []
    for tau in taus:
        u, s, v = leading(tau if low_rank else tau - mean, rank)
        targets.append(u * s @ v + (0 if low_rank else mean))
        _, s, v = leading(tau, rank)
        seen.append(s[:, None] * v)

    def slope(merged: Tensor) -> Tensor:
        parts = zip(targets, seen, sizes, strict=True)
        return sum(2 * (merged - target) @ x.T @ x / s for target, x, s in parts)

    if low_rank:
        return descended(mean, slope, partial(torch.optim.SGD, lr=1e-4, momentum=0.9))
    return descended(taus.sum(0), slope, adam(1e-5))


def doge(taus: Tensor, eta: float = 0.07, divisor: int = 6) -> Tensor:
    """fusion_bench's `doge_ta` without its mask: full singular value decompositions, 400 steps of Adam."""
    weights = eta / taus.flatten(1).norm(dim=1)
    rank, directions = min(taus.shape[1:]) // len(taus), min(taus.shape[1:]) // divisor
    basis = leading(torch.cat([leading(tau, rank)[0] for tau in taus], dim=1), directions)[0]
    change = torch.zeros_like(taus[0], requires_grad=True)
    steps = torch.optim.Adam([change], lr=1e-4)
    for _ in range(400):
        steps.zero_grad()
        merged = torch.einsum("k,kmn->mn", weights, taus) + weights.sum() * change
        (taus * (taus - merged)).sum(2).square().sum().backward()
        change.grad -= basis @ (basis.T @ change.grad)
        steps.step()
    return torch.einsum("k,kmn->mn", weights, taus + change.detach())


def tsv(taus: Tensor) -> Tensor:
    """TSV-M: min(m, n) / K triples per expert, also those of singular value zero."""
    rank = min(taus.shape[1:]) // len(taus)
    u, s, v = (list(part) for part in zip(*[leading(tau, rank) for tau in taus], strict=True))
    left, _, left_t = torch.linalg.svd(torch.cat(u, dim=1), full_matrices=False)
    right, _, right_t = torch.linalg.svd(torch.cat(v), full_matrices=False)
    return left @ left_t * torch.cat(s) @ (right @ right_t)


def opcm(taus: Tensor, alpha: float = 0.5) -> Tensor:
    """fusion_bench's `OPCMForCLIP` on one linear layer: full bases, whose zero directions are arbitrary."""
    merged, norms = taus[0].clone(), [taus[0].norm()]
    scale = torch.ones((), dtype=taus.dtype)  # lambda of the previous step
    for tau in taus[1:]:
        norms.append(tau.norm())
        u, s, v = torch.linalg.svd(merged, full_matrices=True)
        split = int((s.cumsum(0) / s.sum() > alpha).float().argmax())
        inner = u.T @ tau @ v.T
        inner.diagonal().fill_(0)
        inner[:split, :split] = 0
        moved = scale * merged + u @ inner @ v
        mean = torch.stack(norms).mean()
        scale = moved.norm() / mean
        merged = moved / scale
    return merged


def widen(base: Tensor, taus: Tensor) -> Tensor:
    """MergeLLM's `widen_merging` of one parameter: a linear layer, or a vector."""

    def scores(sizes: Tensor) -> Tensor:
        found = sizes.softmax(dim=0)
        found[sizes > sizes.mean(dim=1, keepdim=True)] = 1.0
        return found

    if base.dim() == 1:
        return (taus * scores(taus.abs())).sum(0)
    models = base + taus
    lengths, size = models.norm(dim=1), base.norm(dim=0)
    turned = 1 - torch.cosine_similarity(models / lengths[:, None], (base / size)[None], dim=1)
    ranks = [
        x.argsort(dim=1, stable=True).argsort(dim=1) / x.shape[1] for x in ((lengths - size).abs(), turned)
    ]
    return (taus * (sum(scores(rank) for rank in ranks) / 2)[:, None]).sum(0)


def apart(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|."""
    return float((ours - theirs).norm() / theirs.norm())


def merged(method: tm.Preprocess, taus: Tensor) -> Tensor:
    return one(method, *taus).sum(0)


def figures() -> dict[str, float]:
    """What the page of methods quotes."""
    full, low = experts(), experts(low_rank=True)
    by_sgd, by_adam = optmerge(low, True), optmerge(full, False)
    cg, paper = tm.Doge(density=1.0), tm.Doge(density=1.0, solver="adam")
    return {
        "wudi": apart(merged(tm.Wudi(300.0), full), wudi(full)),
        "wudi, default": apart(merged(tm.Wudi(), full), wudi(full)),
        "optmerge": apart(merged(tm.OptMerge(), full), by_adam),
        "optmerge, low-rank": apart(merged(tm.OptMerge(start="mean"), low), by_sgd),
        "optmerge, low-rank, time 300": apart(merged(tm.OptMerge(300.0, "mean"), low), by_sgd),
        "doge": apart(merged(cg, full), doge(full)),
        "doge, low-rank": apart(merged(cg, low), doge(low)),
        "doge, adam": apart(merged(paper, full), doge(full)),
        "doge, adam, low-rank": apart(merged(paper, low), doge(low)),
        "tsv": apart(merged(tm.Tsv(), full), tsv(full)),
        "tsv, low-rank": apart(merged(tm.Tsv(), low), tsv(low)),
        "opcm": apart(merged(tm.Opcm(), full), opcm(full)),
        "opcm, low-rank": apart(merged(tm.Opcm(), low), opcm(low)),
    }


if __name__ == "__main__":
    for name, figure in figures().items():
        print(f"{name:30} {figure:.2g}")
