"""A small convolutional net with batch norms, its experts, and batches: no transformers, no folder."""

from copy import deepcopy

import torch
from torch import Tensor, nn

from tests.world import nudge


def net() -> nn.Module:
    """A convolution, a batch norm, a drop-out and two linear layers: 4 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return nn.Sequential(
            nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(), nn.Linear(20, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4),
        )  # fmt: skip


def expert_of(base: nn.Module, seed: int, scale: float = 0.2) -> nn.Module:
    """A copy with other parameters and other statistics, in evaluation mode."""
    own = deepcopy(base)
    nudge(own, seed, scale)
    own.train()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for batch in batches(seed + 50, 3):
            own(batch.to(next(own.parameters()).dtype) + seed)
    return own.eval()


def batches(seed: int, count: int, size: int = 6) -> list[Tensor]:
    """Random pictures [B, 2, 5, 5]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 2, 5, 5, generator=generator) for _ in range(count)]
