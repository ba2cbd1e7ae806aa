"""The plan of merging a model of which only config.json has to be there."""

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

import torch
from torch import nn

from trainmerge.checkpoints import build_skeleton
from trainmerge.data.batch import Batch
from trainmerge.model.activation_checkpointing import recompute_blocks
from trainmerge.objectives import Entropy
from trainmerge.plan.devices import Device, measured
from trainmerge.plan.dry_run import rehearse
from trainmerge.plan.micro_batches import Economy, rounds
from trainmerge.plan.plan import Plan, Sizes
from trainmerge.system.console import print_table
from trainmerge.task_vectors.parameter_names import block_of


def plan_model(
    folder: str | Path,
    experts: int,
    batch: int = 1,
    length: int = 1024,
    device: Device | None = None,
    devices: int = 1,
    economy: Economy = Economy(),  # noqa: B008 - frozen
) -> Plan:
    """The plan of merging full experts of a model of which only config.json has to be there.

    One coefficient a tensor and expert, token entropy as the loss, weights in the configuration's dtype.

    Args:
        folder: Holds config.json.
        experts: K.
        batch: Examples of each expert a step, over all devices.
        length: Tokens of each.
        device: Whose speeds the times are made of; this processor's, measured, by default.
        devices: How many share model and examples.
        economy: How a step is cut.

    Raises:
        ValueError: transformers does not know the architecture, or a number is not positive.
    """
    if min(experts, batch, length, devices) < 1:
        raise ValueError("experts, batch, length and devices must be at least 1")
    skeleton = build_skeleton(Path(folder))
    dtype = getattr(skeleton.config, "dtype", None) or torch.float32
    own = {name: p.numel() * dtype.itemsize for name, p in skeleton.named_parameters()}
    read = {name: (experts + 1) * count for name, count in own.items()}
    sizes = _sizes(skeleton, own, read, experts, experts * len(own), sum(read.values()))
    tokens = torch.zeros(-(-batch // devices), length, dtype=torch.int64)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    step = [Batch(k, inputs, tokens == 0, torch.arange(len(tokens))) for k in range(experts)]
    if economy.recompute:
        recompute_blocks(skeleton)
    parts = list(rounds(step, economy))
    rehearsal = rehearse(skeleton, own, parts[:1], Entropy(), dtypes=dtype)
    rehearsal = rehearsal._replace(flops=rehearsal.flops * len(parts))  # every round is like the first
    device = device or measured(dtype)
    return Plan(sizes, economy, rehearsal, len(parts), device, devices)


def print_plan(plan: Plan) -> None:
    """Print a plan as a table."""
    print_table(plan.title(), ["what", "how much", ""], plan.rows())


def _sizes(
    skeleton: nn.Module,
    own: Mapping[str, int],
    read: Mapping[str, int],
    experts: int,
    coefficients: int,
    files: int,
    beforehand: int = 0,
) -> Sizes:
    """`own` are the bytes of every parameter, `read` those of a pass over the merged ones."""
    return Sizes(
        parameters=sum(p.numel() for p in skeleton.parameters()),
        experts=experts,
        coefficients=coefficients,
        weights=sum(own.values()) + sum(buffer.nbytes for buffer in skeleton.buffers()),
        gradient=max(own[name] for name in read),
        gradients=sum(own[name] for name in read),
        block=max(sum(own[name] for name in block) for _, block in groupby(own, block_of)),
        vectors=sum(read.values()),
        widest=max(read.values()),
        files=files,
        beforehand=beforehand,
    )
