"""How many blocks of a sharded model are gathered ahead of the one that runs.

FSDP2 by itself gathers one ahead: the next block while one runs, because the processor is ahead of the
device, and in the backward by the order in which blocks ran. That hides gathers that take no longer than a
block's computation; several ahead also hide a few longer ones.
"""

from torch import nn
from torch.distributed.fsdp import FSDPModule


def gather_ahead(root: nn.Module, distance: int) -> None:
    """Let every block gather the next `distance` ones, and in the backward the previous ones.

    Blocks of one list run in its order; other units keep FSDP2's way. Weights are the same, bit by bit, and
    as many bytes are gathered. Memory has `distance` gathered blocks beside the one that runs.
    """
    if distance == 0:
        _gather_in_turn(root)
    elif distance > 1:
        for place in root.modules():
            if isinstance(place, nn.ModuleList):
                _gather_several([block for block in place if isinstance(block, FSDPModule)], distance)


def _gather_in_turn(root: nn.Module) -> None:
    """Gather each unit just before it runs."""
    for unit in root.modules():
        if isinstance(unit, FSDPModule):
            unit._set_unshard_async_op(True)  # in the stream of computations, after those before it
            unit.set_modules_to_backward_prefetch([unit])  # nothing: an empty list would be FSDP2's way


def _gather_several(blocks: list[FSDPModule], distance: int) -> None:
    for number, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[number + 1 : number + 1 + distance])
        block.set_modules_to_backward_prefetch(blocks[max(0, number - distance) : number][::-1])
