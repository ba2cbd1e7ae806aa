"""Products of a mixture's tokens with their experts' matrices, whose fake kernel knows bfloat16 only.

Legend: `T` tokens times experts per token, in groups of one expert, `E` experts, `m`, `n` widths.
"""

from typing import Any

import torch
from torch import Tensor

GROUPED = torch.ops.aten._grouped_mm


def grouped_product(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """An empty result of `torch._grouped_mm`: [T, m] x [E, m, n] -> [T, n], [m, T] x [T, n] -> [E, m, n]."""
    one: Tensor
    other: Tensor
    one, other = args[:2]
    shape = [one.shape[-2], other.shape[-1]]
    return one.new_empty([len(_ends(args, kwargs)), *shape] if one.dim() == other.dim() == 2 else shape)


def grouped_flops(args: tuple[Any, ...]) -> int:
    """Its operations; a multiply-add counts two."""
    one, other = args[:2]
    return int(2 * one.shape[-2] * one.shape[-1] * other.shape[-1])


def _ends(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Where the groups end, [E]."""
    found: Tensor = args[2] if len(args) > 2 else kwargs["offs"]
    return found
