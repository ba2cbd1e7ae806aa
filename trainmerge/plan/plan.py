"""What a fit will hold and how long a step will take, before it begins.

Arithmetic on sizes from headers and on a rehearsed step; nothing is read. One device holds the merged model,
what a step's forwards and backwards need, and a block of scratch; base and task vectors stay in mapped files.
Of N devices each holds 1/N of the weights and a gathered block, and exchanges what FSDP of one model does.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from trainmerge.kernels import waiting
from trainmerge.plan.devices import Device
from trainmerge.plan.dry_run import Rehearsal
from trainmerge.plan.micro_batches import Economy
from trainmerge.system.memory import format_size

SCRATCH = 16 << 20  # bytes: blocks of the two passes, in float32
STATE = 40  # bytes a coefficient: value, gradient (also in float64), Adam's two moments, the start, copies


@dataclass(frozen=True)
class Sizes:
    """A merge's tensors, in bytes where it isn't a count."""

    parameters: int  # weights of the model: a count
    experts: int  # a count
    coefficients: int  # a count
    weights: int  # the resident model, buffers included
    gradient: int  # the largest merged weight's gradient
    gradients: int  # those of all of them
    block: int  # the largest block of the network: what a sharded model gathers at a time
    vectors: int  # base and task vectors of what is merged: what one pass reads
    widest: int  # of these, the parameter's with the most
    files: int  # all that is mapped: base, experts, recorded experts
    beforehand: int = 0  # what loading, or recording an expert, holds beside the model

    @property
    def merged(self) -> int:
        """The device's share that never changes with a batch: model, scratch, coefficients."""
        return self.weights + SCRATCH + STATE * self.coefficients


@dataclass(frozen=True)
class Plan:
    """A fit's memory and time a step, on each of `devices` equal devices.

    Args:
        sizes: The merge's tensors.
        economy: How a step is cut.
        rehearsal: One device's share of a step's examples, rehearsed.
        backwards: Backwards a step.
        device: Its speeds.
        devices: How many.
        before: Bytes that the process holds already.
    """

    sizes: Sizes
    economy: Economy
    rehearsal: Rehearsal
    backwards: int
    device: Device
    devices: int = 1
    before: int = 0

    @property
    def held(self) -> Mapping[str, int]:
        """Bytes on each device, by what they are."""
        sizes, shards = self.sizes, self.devices
        rows = {"the process before the fit": self.before, "merged model": -(-sizes.weights // shards)}
        if shards > 1:
            rows["gathered: a block, and the next"] = 2 * sizes.block
            rows["gradients of a block"] = sizes.block
        rows["activations"] = self.rehearsal.held
        beside = self.rehearsal.peak - self.rehearsal.held
        if self.economy.keep:
            rows["gradients kept"] = -(-sizes.gradients // shards)
        rows["largest gradient"] = min(sizes.gradient, beside)
        rows["between operators"] = beside - min(sizes.gradient, beside)
        rows["loading and recording, above a step"] = max(0, sizes.beforehand - self.rehearsal.peak)
        if self.device.link:
            rows["task vectors on their way, two parameters"] = 2 * -(-sizes.widest // shards)
        kind = torch.device("cuda" if self.device.link else "cpu")
        rows["waiting for a launch of Triton's kernels"] = min(waiting(kind), sizes.vectors + sizes.weights)
        rows["scratch of the passes"] = SCRATCH
        rows["coefficients and optimizer"] = STATE * sizes.coefficients
        return {name: count for name, count in rows.items() if count}

    @property
    def total(self) -> int:
        """Bytes on each device at the highest moment."""
        return sum(self.held.values())

    @property
    def mapped(self) -> int:
        """Bytes of mapped files a device reads from: page cache, which the system takes back at will."""
        return -(-self.sizes.files // self.devices)

    @property
    def read(self) -> int:
        """Bytes of base and task vectors that a device reads a step, to merge and for its backwards."""
        passes = 1 if self.economy.keep else self.backwards
        return -(-self.sizes.vectors * (1 + passes) // self.devices)

    @property
    def exchanged(self) -> int:
        """Bytes a device receives a step: weights gathered twice and gradients scattered once a backward."""
        return 3 * self.backwards * self.sizes.weights * (self.devices - 1) // self.devices

    @property
    def seconds(self) -> Mapping[str, float]:
        """Of a step, by what takes them; nothing is taken to overlap."""
        device = self.device
        rows = {
            "forward and backward": self.rehearsal.flops / (device.flops * device.use),
            "merge and coefficient gradient": self.read / (device.link or device.bandwidth),
        }
        if self.devices > 1:
            rows["exchange"] = self.exchanged / (device.exchange or device.bandwidth)
        return rows

    def rows(self) -> list[list[str]]:
        """The plan as a table's cells: what, how much, remark."""
        device = self.device
        rows = [[name, format_size(count), ""] for name, count in self.held.items()]
        limit = f"of {format_size(device.memory)}" if device.memory else ""
        rows.append(["held at most, a device", format_size(self.total), limit])
        rows.append(["mapped files", format_size(self.mapped), "page cache, not counted"])
        rows.append(
            ["base and task vectors read a step", format_size(self.read), f"{self.backwards} backwards"]
        )
        if self.devices > 1:
            rows.append(["exchanged a step", format_size(self.exchanged), "as FSDP of one model"])
        rows.append(["computed a step", f"{self.rehearsal.flops / 1e12:.3g} TFLOP", "matrix products"])
        rows += [[name, f"{seconds:.3g} s", device.name] for name, seconds in self.seconds.items()]
        return [*rows, ["a step", f"{sum(self.seconds.values()):.3g} s", "if nothing overlaps"]]

    def title(self) -> str:
        """What is planned, in a line."""
        sizes = self.sizes
        devices = f"{self.devices} x " if self.devices > 1 else ""
        return (
            f"{sizes.parameters:,} weights, {sizes.experts} experts, {sizes.coefficients:,} coefficients; "
            f"{self.economy}; {devices}{self.device.name}"
        )
