"""The k-th largest magnitude against a sort."""

import pytest
import torch
from torch import Tensor

from trainmerge.task_vectors.top_k import Cut, cuts

SIZE = 4000
ROWS = {
    "normal": torch.randn(SIZE, generator=torch.Generator().manual_seed(0)),
    "few values": torch.randint(-3, 4, (SIZE,), generator=torch.Generator().manual_seed(1)).float(),
    "largest floats": torch.full((SIZE,), torch.finfo(torch.float32).max),
    "denormal": torch.arange(SIZE) * 1.4e-45,
}


def kept(cut: Cut, row: Tensor) -> Tensor:
    """Which entries of a row without zeros pass."""
    return cut(row) != 0


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("wanted", [1, 1234, SIZE])
@pytest.mark.parametrize("sampled", [False, True])
def test_cuts_are_the_sorted_magnitudes(name: str, wanted: int, sampled: bool) -> None:
    row = ROWS[name]
    pieces = [row[:1500].view(1, -1), row[1500:].view(1, -1)]
    thin = [row[::10].view(1, -1)]
    (cut,) = cuts(lambda: pieces, wanted, (lambda: thin) if sampled else None, max(1, wanted // 10))
    assert cut.value == row.abs().sort(descending=True).values[wanted - 1]
    whole = int((row.abs() > cut.value).sum())
    assert cut.ties == wanted - whole
    if cut.value:
        assert int((torch.cat([kept(cut, piece) for piece in pieces], 1)).sum()) == wanted
    assert torch.equal(row, ROWS[name])


def test_numbers_that_are_not_finite_are_refused() -> None:
    row = torch.tensor([[1.0, 2.0, float("nan")]])
    with pytest.raises(ValueError, match="not finite cannot be ranked"):
        cuts(lambda: [row], 1)
