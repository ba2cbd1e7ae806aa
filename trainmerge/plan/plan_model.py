"""The plan of a fit from config.json alone."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainmerge.checkpoints import build_meta_model, output_of
from trainmerge.data.batch import Batch
from trainmerge.model.activation_checkpointing import recompute_blocks
from trainmerge.model.embedding import unread_modules
from trainmerge.model.residency import Vectors
from trainmerge.objectives import Entropy
from trainmerge.plan.devices import Device, measured
from trainmerge.plan.dry_run import dry_run
from trainmerge.plan.fastest import StepTasks, fastest
from trainmerge.plan.micro_batches import OpenSchedule, StepSchedule, rounds
from trainmerge.plan.plan import USABLE, Plan
from trainmerge.plan.sizes import sizes_of
from trainmerge.system.console import print_table
from trainmerge.system.hub import folder_of
from trainmerge.system.ranges import check_option

LENGTH = 1024  # tokens, by default
EXPERTS = 10_000  # at most: each has a batch in the plan


def plan_model(
    folder: str | Path,
    experts: int,
    batch: int = 1,
    length: int | None = None,
    device: Device | None = None,
    devices: int = 1,
    schedule: StepSchedule | None = StepSchedule(),  # noqa: B008 - frozen
    vectors: Vectors = "auto",
    gathered_ahead: int = 1,
) -> Plan:
    """The plan of a fit of full experts: one coefficient per tensor and expert, token entropy as the loss.

    Args:
        folder: A folder with config.json, which gives the weights' dtype, or an id of the hub; no weights
            are needed.
        experts: K.
        batch: Examples per expert and step, over all devices.
        length: Tokens per example; pictures have the size that config.json names. By default 1024, or as many
            as the model has positions for.
        device: The device whose speeds give the times; by default this processor, measured.
        devices: The number of devices that share model and examples.
        schedule: How a step is split into backwards; None chooses as a fit does where the device's memory is
            known.
        vectors: Where base and task vectors are held.
        gathered_ahead: Blocks that devices gather ahead of the one that runs.

    Raises:
        ValueError: transformers does not know the architecture, a number is out of range, or `length` is more
            than the model has positions for.

    Warns of modules of sentence-transformers that a fit by Similarity refuses.
    """
    counts = {
        "experts": experts,
        "batch": batch,
        "length": LENGTH if length is None else length,
        "devices": devices,
    }
    for name, count in counts.items():
        check_option(name, count, int, "[1, inf)")
    check_option("experts", experts, int, f"[1, {EXPERTS}]")
    check_option("gathered_ahead", gathered_ahead, int, "[0, inf)")
    files = folder_of(folder, weights=False)
    for line in unread_modules(files):
        warnings.warn(line, stacklevel=2)
    dtype, tokens = _dtype(build_meta_model(files)), _tokens(files, length)
    here = device or measured(dtype)

    def planned(chosen: StepSchedule) -> Plan:
        meta_model = build_meta_model(files)
        own = {name: p.numel() * dtype.itemsize for name, p in meta_model.named_parameters()}
        read = {name: (experts + 1) * count for name, count in own.items()}
        sizes = sizes_of(meta_model, own, read, own, experts, experts * len(own), sum(read.values()))
        inputs = _inputs(meta_model, -(-batch // devices), tokens)
        if chosen.recompute:
            recompute_blocks(meta_model)
        parts = list(rounds([_batch(k, inputs) for k in range(experts)], chosen))
        needs = dry_run(meta_model, own, parts[:1], Entropy(), dtypes=dtype)
        # all batches are equal
        needs = needs._replace(flops=needs.flops * sum(map(len, parts)) // len(parts[0]))
        needed = needs, len(parts), here, devices
        one_pass = devices == 1  # a fit's defaults: Adam, and a coefficient per tensor
        return Plan(sizes, chosen, *needed, vectors=vectors, ahead=gathered_ahead, one_pass=one_pass)

    if schedule is not None or not here.memory:
        return planned(schedule or StepSchedule())
    tasks = StepTasks(experts, -(-batch // devices))
    return fastest(OpenSchedule(), tasks, planned, int(USABLE * here.memory))[0]


def _tokens(folder: Path, length: int | None) -> int:
    """The tokens of an example."""
    output = output_of(folder)
    most = min((count for count in output.positions if count is not None), default=None)
    if length is None or output.reads == "media":
        return min(length or LENGTH, most or LENGTH)
    if most is not None and length > most:
        raise ValueError(
            f"{folder}: {output.architecture} has {most} positions, and --length is {length}: set it to "
            f"{most} or less"
        )
    return length


def _dtype(meta_model: nn.Module) -> torch.dtype:
    """The weights' dtype by the configuration."""
    dtype: torch.dtype = getattr(meta_model.config, "dtype", None) or torch.float32
    return dtype


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
