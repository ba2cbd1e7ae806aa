"""Rows of embeddings and their loss, also in several processes: imports little, because each imports it anew.

Legend: `B` examples, `T` tokens, `E` width of an embedding.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from trainmerge.data.batch import Batch, Outputs, Signals
from trainmerge.objectives.similarity import Similarity

B, T, E = 5, 4, 6
MASK = torch.ones(B, T, dtype=torch.bool)


def rows(seed: int, count: int = B) -> Tensor:
    return torch.randn(count, E, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def batch_of(expert: Tensor, **settings: object) -> Batch:
    ids = torch.arange(len(expert))
    return Batch(0, {}, MASK[: len(expert)], ids, Signals(embedding=expert), **settings)


def outputs(merged: Tensor) -> Outputs:
    return Outputs(merged.new_empty(0), embedding=merged)


def process(rank: int, sizes: tuple[int, ...], folder: str, relative: bool) -> None:
    """One of several processes with its rows; a size of 0 is a row of share 0, another process's."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=len(sizes))
    first, count = sum(sizes[:rank]), sizes[rank]
    part = slice(first, first + count) if count else slice(0, 1)
    share = count * len(sizes) / sum(sizes)
    merged = rows(0)[part].requires_grad_()
    losses = Similarity(0.3, relative)(outputs(merged), batch_of(rows(1)[part], share=share))
    loss = share * losses.mean() / len(sizes)
    (slope,) = torch.autograd.grad(loss, merged)
    torch.save((loss.detach(), slope[:count]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
