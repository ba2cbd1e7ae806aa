"""Random draws that depend on a seed and names only, not on the order in which parameters are read.

Legend: `*S` shape of a parameter or of some rows of it.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def seeded(seed: int, *names: str) -> torch.Generator:
    """A generator on the CPU for these names."""
    digest = hashlib.sha256("/".join([str(seed), *names]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def uniform(shape: Sequence[int], seed: int, *names: str) -> Tensor:
    """Numbers in [0, 1), [*S] float32, for these names."""
    return torch.rand(shape, generator=seeded(seed, *names), dtype=torch.float32)
