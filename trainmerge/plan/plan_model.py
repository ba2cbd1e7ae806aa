"""The plan of a fit from config.json alone."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainmerge.checkpoints import build_meta_model
from trainmerge.data.batch import Batch
from trainmerge.model.activation_checkpointing import recompute_blocks
from trainmerge.objectives import Entropy
from trainmerge.plan.devices import Device, measured
from trainmerge.plan.dry_run import dry_run
from trainmerge.plan.micro_batches import StepSchedule, rounds
from trainmerge.plan.plan import Plan
from trainmerge.plan.sizes import sizes_of
from trainmerge.system.console import print_table
from trainmerge.system.hub import folder_of
from trainmerge.system.ranges import check_option


def plan_model(
    folder: str | Path,
    experts: int,
    batch: int = 1,
    length: int = 1024,
    device: Device | None = None,
    devices: int = 1,
    schedule: StepSchedule = StepSchedule(),  # noqa: B008 - frozen
) -> Plan:
    """The plan of a fit of full experts: one coefficient per tensor and expert, token entropy as the loss.

    Args:
        folder: A folder with config.json, which gives the weights' dtype, or an id of the hub; no weights
            are needed.
        experts: K.
        batch: Examples per expert and step, over all devices.
        length: Tokens per example; pictures have the size that config.json names.
        device: The device whose speeds give the times; by default this processor, measured.
        devices: The number of devices that share model and examples.
        schedule: How a step is split into backwards.

    Raises:
        ValueError: transformers does not know the architecture, or a number is not positive.
    """
    counts = {"experts": experts, "batch": batch, "length": length, "devices": devices}
    for name, count in counts.items():
        check_option(name, count, int, "[1, inf)")
    meta_model = build_meta_model(folder_of(folder, weights=False))
    dtype = getattr(meta_model.config, "dtype", None) or torch.float32
    own = {name: p.numel() * dtype.itemsize for name, p in meta_model.named_parameters()}
    read = {name: (experts + 1) * count for name, count in own.items()}
    sizes = sizes_of(meta_model, own, read, own, experts, experts * len(own), sum(read.values()))
    inputs = _inputs(meta_model, -(-batch // devices), length)
    step = [_batch(k, inputs) for k in range(experts)]
    if schedule.recompute:
        recompute_blocks(meta_model)
    parts = list(rounds(step, schedule))
    needs = dry_run(meta_model, own, parts[:1], Entropy(), dtypes=dtype)
    needs = needs._replace(flops=needs.flops * len(parts))  # all rounds are equal
    return Plan(sizes, schedule, needs, len(parts), device or measured(dtype), devices)


def _inputs(meta_model: Any, batch: int, length: int) -> dict[str, Tensor]:
    """Texts [batch, length]; with a decoder, targets as long; or pictures of the configuration's size."""
    config = meta_model.config
    if meta_model.main_input_name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.zeros(batch, getattr(config, "num_channels", 3), height, width)}
    tokens = torch.zeros(batch, length, dtype=torch.int64)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return {**inputs, "labels": tokens} if config.is_encoder_decoder else inputs


def _batch(expert: int, inputs: dict[str, Tensor]) -> Batch:
    """One expert's part of a step; all positions count, a picture is one."""
    first = next(iter(inputs.values()))
    mask = torch.ones(first.shape if first.dim() == 2 else (len(first), 1), dtype=torch.bool)
    return Batch(expert, inputs, mask, torch.arange(len(first)))


def print_plan(plan: Plan) -> None:
    """Print a plan as a table."""
    print_table(plan.title(), ["quantity", "value", "remark"], plan.rows())
