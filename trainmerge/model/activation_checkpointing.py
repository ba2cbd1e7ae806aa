"""Activation checkpointing of a transformers model's blocks, in eval mode too."""

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def recompute_blocks(module: nn.Module) -> int:
    """Checkpoint every block: store only its input and recompute it in the backward. Returns their number.

    transformers checkpoints in train mode only, and silently does not in eval mode. So the blocks themselves,
    but no module inside them, are set to train mode; dropout is 0 in any case.
    """
    blocks: list[Any] = [block for block in module.modules() if isinstance(block, GradientCheckpointingLayer)]
    for block in blocks:
        block._gradient_checkpointing_func = partial(
            checkpoint, use_reentrant=False, preserve_rng_state=False
        )
        block.gradient_checkpointing = True
        block.training = True
    return len(blocks)
