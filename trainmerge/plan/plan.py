"""What a fit will hold and how long a step will take, before it begins.

Arithmetic on sizes from headers and on a step's dry run; nothing is read. One device holds the merged model,
what a step's forwards and backwards need, and a block of scratch; base and task vectors stay in mapped files.
Of N devices each holds 1/N of the weights and a gathered block, and exchanges what FSDP of one model does.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from trainmerge.kernels import waiting
from trainmerge.plan.devices import Device
from trainmerge.plan.dry_run import DryRun
from trainmerge.plan.micro_batches import StepSchedule
from trainmerge.plan.sizes import Sizes
from trainmerge.plan.step_memory import StepMemory
from trainmerge.system.memory import format_size

SCRATCH = 16 << 20  # bytes: blocks of the two passes, in float32
STATE = 40  # bytes a coefficient: value, gradient (also in float64), Adam's two moments, the start, copies


@dataclass(frozen=True)
class Plan:
    """A fit's memory and time a step, on each of `devices` equal devices.

    Args:
        sizes: The merge's tensors.
        schedule: How a step is cut.
        dry_run: What one device's share of a step's examples needs.
        backwards: Backwards a step.
        device: Its speeds.
        devices: How many.
        before: Bytes that the process holds already.
    """

    sizes: Sizes
    schedule: StepSchedule
    dry_run: DryRun
    backwards: int
    device: Device
    devices: int = 1
    before: int = 0

    @property
    def memory(self) -> StepMemory:
        """Bytes on each device, by purpose."""
        sizes, shards = self.sizes, self.devices
        gathers, prefetches = shards > 1, self.device.link > 0
        transient = self.dry_run.peak - self.dry_run.activations
        largest = min(sizes.gradient, transient)
        kind = torch.device("cuda" if prefetches else "cpu")
        return StepMemory(
            process=self.before,
            model=_share(sizes.weights, shards),
            gathered=2 * sizes.block * gathers,
            block_gradients=sizes.block * gathers,
            activations=self.dry_run.activations,
            summed_gradients=_share(sizes.gradients, shards) * self.schedule.keep,
            largest_gradient=largest,
            operators=transient - largest,
            preparation=max(0, sizes.beforehand - self.dry_run.peak),
            prefetched=2 * _share(sizes.widest, shards) * prefetches,
            launches=min(waiting(kind), sizes.vectors + sizes.weights),
            scratch=SCRATCH,
            coefficients=STATE * sizes.coefficients,
        )

    @property
    def total(self) -> int:
        """Bytes on each device at the highest moment."""
        return self.memory.total

    @property
    def mapped(self) -> int:
        """Bytes of mapped files a device reads from: page cache, which the system takes back at will."""
        return _share(self.sizes.files, self.devices)

    @property
    def read(self) -> int:
        """Bytes of base and task vectors that a device reads a step, to merge and for its backwards."""
        passes = 1 if self.schedule.keep else self.backwards
        return _share(self.sizes.vectors * (1 + passes), self.devices)

    @property
    def exchanged(self) -> int:
        """Bytes a device receives a step: weights gathered twice and gradients scattered once a backward."""
        return 3 * self.backwards * self.sizes.weights * (self.devices - 1) // self.devices

    @property
    def seconds(self) -> Mapping[str, float]:
        """Of a step, by what takes them; nothing is taken to overlap."""
        device = self.device
        rows = {
            "forward and backward": self.dry_run.flops / (device.flops * device.use),
            "merge and coefficient gradient": self.read / (device.link or device.bandwidth),
        }
        if self.devices > 1:
            rows["exchange"] = self.exchanged / (device.exchange or device.bandwidth)
        return rows

    def rows(self) -> list[list[str]]:
        """The plan as a table's cells: what, how much, remark."""
        device = self.device
        rows = [[caption, size, ""] for caption, size in self.memory.rows()]
        rows[-1][2] = f"of {format_size(device.memory)}" if device.memory else ""
        rows.append(["mapped files", format_size(self.mapped), "page cache, not counted"])
        rows.append(
            ["base and task vectors read a step", format_size(self.read), f"{self.backwards} backwards"]
        )
        if self.devices > 1:
            rows.append(["exchanged a step", format_size(self.exchanged), "as FSDP of one model"])
        rows.append(["computed a step", f"{self.dry_run.flops / 1e12:.3g} TFLOP", "matrix products"])
        rows += [[name, f"{seconds:.3g} s", device.name] for name, seconds in self.seconds.items()]
        return [*rows, ["a step", f"{sum(self.seconds.values()):.3g} s", "if nothing overlaps"]]

    def title(self) -> str:
        """What is planned, in a line."""
        sizes = self.sizes
        devices = f"{self.devices} x " if self.devices > 1 else ""
        return (
            f"{sizes.parameters:,} weights, {sizes.experts} experts, {sizes.coefficients:,} coefficients; "
            f"{self.schedule}; {devices}{self.device.name}"
        )


def _share(count: int, devices: int) -> int:
    """One device's share of so many bytes, rounded up."""
    return -(-count // devices)
