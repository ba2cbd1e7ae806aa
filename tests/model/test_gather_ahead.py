"""Blocks of a sharded model that are gathered ahead: how many, and the same numbers."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ranks import join_group, run
from tests.world import llama
from trainmerge.checkpoints import load_meta_model, open_checkpoint
from trainmerge.model.fsdp import shard_model
from trainmerge.model.row_shards import local

LAYERS = 5
WHOLE = {"_allgather_base_": 0, "_reduce_scatter_base_": 1}  # which argument is a whole unit


class Order(TorchDispatchMode):
    """Notes each collective of a whole unit with `size` bytes: a block's."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.seen = size, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2]
        if name in WHOLE and args[WHOLE[name]].nbytes == self.size:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def most_ahead(seen: Sequence[str], used: str) -> int:
    """The most blocks that are gathered when one is used, beside it and those used before."""
    places = [place for place, what in enumerate(seen) if what == used]
    return max(seen[:place].count("_allgather_base_") - number for number, place in enumerate(places, 1))


def passes(base: Path, distance: int) -> dict[str, Any]:
    """One process's forward and backward with so many blocks gathered ahead."""
    checkpoint = open_checkpoint(base)
    loaded = load_meta_model(checkpoint)
    root = shard_model(loaded, checkpoint, [*loaded.names], torch.device("cpu"), ahead=distance)
    blocks: Any = loaded.module.get_submodule("model.layers")
    order = Order(2 * sum(local(p).nbytes for p in blocks[0].parameters()))
    for block in blocks:  # after FSDP2's own hook
        block.register_forward_pre_hook(lambda *_: order.seen.append("run"))
    with order:
        output = root(loaded.module, torch.arange(12).view(2, 6)).logits
        forwards = len(order.seen)
        output.square().mean().backward()
    return {
        "ahead": [
            most_ahead(order.seen[:forwards], "run"),
            most_ahead(order.seen[forwards:], "_reduce_scatter_base_"),
        ],
        "gathered": order.seen.count("_allgather_base_"),
        "output": output.detach(),
        "gradients": [local(p.grad).clone() for p in loaded.module.parameters()],  # type: ignore[arg-type]
    }


def all_passes(base: Path, distances: Sequence[int]) -> dict[int, dict[str, Any]]:
    join_group()
    return {distance: passes(base, distance) for distance in distances}


def test_blocks_are_gathered_as_far_ahead_as_asked_with_the_same_numbers(tmp_path: Path) -> None:
    llama(layers=LAYERS).save_pretrained(tmp_path)
    for found in run(2, all_passes, tmp_path, [0, 1, 2, 3, 9]):
        assert {distance: own["ahead"] for distance, own in found.items()} == {
            0: [0, 0],
            1: [0, 1],  # forwards have one more where a device computes on while the next is asked for
            2: [2, 2],
            3: [3, 3],
            9: [LAYERS - 1] * 2,
        }
        for one, other in pairwise(found.values()):
            assert one["gathered"] == other["gathered"] == 2 * LAYERS
            assert torch.equal(one["output"], other["output"])
            assert all(map(torch.equal, one["gradients"], other["gradients"]))
