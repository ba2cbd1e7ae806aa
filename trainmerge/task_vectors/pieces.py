"""Large parameters in pieces of consecutive rows."""

from collections.abc import Iterator

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
