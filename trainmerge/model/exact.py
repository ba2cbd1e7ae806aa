"""Passes over weights outside a mixed-precision step."""

import torch
from torch import Tensor


def exact(parameter: Tensor) -> torch.autocast:
    """Disable autocast: the passes choose their own precision, also in a mixed-precision step."""
    return torch.autocast(parameter.device.type, enabled=False)
