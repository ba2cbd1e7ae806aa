"""Positions that a model computes, though they are a parameter: sinusoids of Marian and Pegasus.

Files may have or lack them, by the version of transformers that saved them. They are never random.
"""

from typing import Any

import torch
from torch import Tensor, nn

from trainmerge.checkpoints.parameters import Parameters

TOLERANCE = 1e-3  # of values between -1 and 1, saved in 16 bits perhaps


def computed_parameters(model: nn.Module) -> dict[str, nn.Embedding]:
    """Parameter -> the embedding that computes it."""
    owners: dict[str, Any] = dict(model.named_modules())
    return {
        f"{name}.weight": owner
        for name, owner in owners.items()
        if isinstance(owner, nn.Embedding) and hasattr(owner, "create_weight")
    }


def compute(owner: nn.Embedding) -> Tensor:
    """The values of its weight, [positions, D] on the CPU."""
    made: Any = owner
    values: Tensor = made.create_weight()
    return values.detach()


def stored_as_computed(own: Parameters, parameter: str) -> bool:
    """Whether a parameter's tensor in the files is what its class computes; reads it."""
    owner = computed_parameters(own.meta_model).get(parameter)
    if owner is None or parameter not in own.files:
        return False
    stored = own.checkpoint.read(own.files[parameter])
    return torch.allclose(stored.float(), compute(owner).float(), rtol=0, atol=TOLERANCE)
