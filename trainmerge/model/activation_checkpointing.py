"""Activation checkpointing of a transformers model's blocks, in eval mode too."""

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def recompute_blocks(module: nn.Module) -> int:
    """Let every block keep only its input and run again in the backward; how many blocks there are.

    transformers does it in train mode only, and says nothing in eval mode. So the blocks themselves, and
    nothing inside them, are set to train; dropout is 0 in any case.
    """
    blocks: list[Any] = [block for block in module.modules() if isinstance(block, GradientCheckpointingLayer)]
    for block in blocks:
        block._gradient_checkpointing_func = partial(
            checkpoint, use_reentrant=False, preserve_rng_state=False
        )
        block.gradient_checkpointing = True
        block.training = True
    return len(blocks)
