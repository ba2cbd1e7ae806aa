"""Large parameters in pieces of consecutive rows.

Legend: `K` experts, `C` chunks of one parameter.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from trainmerge.kernels import chunk_bounds
from trainmerge.task_vectors.delta import Delta

PIECE = 1 << 17  # entries: 512 KiB of float32, so that K of them fit the cache


def in_pieces(name: str, delta: Delta, entries: int | None = None) -> Iterator[tuple[slice, str, Delta]]:
    """Each piece's rows in order, its name, and its differences; a small parameter is one piece.

    Pieces have about `entries` entries. A rule's results may depend on that; the default is `PIECE`.
    """
    entries = entries or PIECE
    size = delta.shape.numel()
    if size <= entries:
        yield slice(None), name, delta
        return
    rows = max(1, entries * delta.shape[0] // size)
    for first in range(0, delta.shape[0], rows):
        part = slice(first, min(first + rows, delta.shape[0]))
        yield part, f"{name}[{part.start}:{part.stop}]", delta.rows(part)


def merge_rows(out: Tensor, delta: Delta, first: int, coefficients: Tensor, whole: torch.Size) -> None:
    """Merge some rows of a parameter of shape `whole`, from row `first` on, into `out`.

    Coefficients [K, C] are the parameter's; chunks may start and end within these rows.
    """
    if coefficients.shape[1] == 1 or out.shape == whole:
        delta.merge(out, coefficients)
        return
    bounds = chunk_bounds(whole[0], coefficients.shape[1])
    for chunk, (begin, end) in enumerate(pairwise(bounds)):
        rows = slice(max(begin - first, 0), min(end - first, len(out)))
        if rows.start < rows.stop:
            delta.rows(rows).merge(out[rows], coefficients[:, chunk : chunk + 1])
