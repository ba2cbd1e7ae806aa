"""The memory of a fit and the time per step, before it begins.

Computed from sizes in headers and a step's dry run; no weight is read. One device stores the merged model,
the activations and gradients of a step, scratch buffers, and what there is room for of base and task vectors
(`model.residency`). Of N devices each stores 1/N of the weights and the gathered blocks, and communicates as
much as FSDP of one model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from trainmerge.kernels import waiting
from trainmerge.model.residency import Residency, Room, Share, Vectors, reside
from trainmerge.plan.devices import Device
from trainmerge.plan.dry_run import DryRun
from trainmerge.plan.micro_batches import StepSchedule
from trainmerge.plan.overlap import Computing, Pass, merging_seconds
from trainmerge.plan.sizes import Sizes
from trainmerge.plan.step_memory import StepMemory
from trainmerge.system.memory import format_size

SCRATCH = 16 << 20  # bytes: blocks of the two passes, in float32
USABLE = 0.9  # of a device's memory: the rest is the driver's, and the allocator's rounding
PINNED = 0.5  # of host memory: the rest is the page cache of the files, and other processes'
STATE = 40  # bytes per coefficient: value, gradient (also in float64), Adam's two moments, the start, copies


@dataclass(frozen=True)
class Plan:
    """A fit's memory and time per step, on each of `devices` equal devices.

    Args:
        sizes: The merge's tensors.
        schedule: How a step is split.
        dry_run: The dry run of one device's share of a step's examples.
        backwards: Backwards per step.
        device: The device's speeds.
        devices: The number of devices.
        before: Bytes that the process uses before the fit.
        vectors: Where base and task vectors are held.
        limit: Bytes of its memory that each device may use; by default 9 of 10 of a known memory.
        ahead: Blocks that are gathered ahead of the one that runs, where devices share the model.
        one_pass: Whether merges are written in the backward before (`model.one_pass`), if vectors are sent.
    """

    sizes: Sizes
    schedule: StepSchedule
    dry_run: DryRun
    backwards: int
    device: Device
    devices: int = 1
    before: int = 0
    vectors: Vectors = "auto"
    limit: int = 0
    ahead: int = 1
    one_pass: bool = False

    @property
    def memory(self) -> StepMemory:
        """Bytes on each device, by purpose."""
        held = self.residency.held
        host = 0 if self.device.link else held["host"]  # a processor's device memory
        return self._memory(held["device"] + host, sending=held["host"] + held["file"] > 0)

    @property
    def residency(self) -> Residency:
        """Where base and task vectors are held.

        Raises:
            ValueError: `vectors` names a place that is known to be too small.
        """
        passes = 1 if self.schedule.keep else self.backwards
        learned, merges = self.sizes.read_twice, 0 if self.one_pass else 1
        shares = {
            name: Share(_share(count, self.devices), merges + passes * (name in learned))
            for name, count in self.sizes.read.items()
        }
        return reside(self.vectors, shares, self.room)

    @property
    def room(self) -> Room | None:
        """What a step leaves free of the device's memory, and of the host's; None if that is unknown."""
        device = self.device
        if not (limit := self.limit or int(USABLE * device.memory)):
            return None
        free = max(0, limit - self._memory(0, sending=True).total)
        return Room(free, int(PINNED * device.host) if device.link else free, device.link, device.bandwidth)

    def _memory(self, vectors: int, sending: bool) -> StepMemory:
        """The same with so many bytes of base and task vectors that stay."""
        sizes, shards, prefetches = self.sizes, self.devices, self.device.link > 0
        block, kind = sizes.block * (shards > 1), torch.device("cuda" if prefetches else "cpu")
        transient = self.dry_run.peak - self.dry_run.activations
        largest = min(sizes.gradient, transient)
        return StepMemory(
            process=self.before,
            model=_share(sizes.weights, shards),
            gathered=min((1 + self.ahead) * block, sizes.weights),
            block_gradients=block,
            activations=self.dry_run.activations,
            summed_gradients=_share(sizes.gradients, shards) * self.schedule.keep,
            largest_gradient=largest,
            operators=transient - largest,
            preparation=max(0, sizes.beforehand - self.dry_run.peak),
            vectors=vectors,
            prefetched=2 * _share(sizes.ahead, shards) * (prefetches and sending),
            launches=min(waiting(kind), sizes.vectors + sizes.weights),
            scratch=SCRATCH,
            coefficients=STATE * sizes.coefficients,
        )

    @property
    def total(self) -> int:
        """Peak bytes on each device."""
        return self.memory.total

    @property
    def needed(self) -> int:
        """Peak bytes that a step cannot do without: what `auto` holds for speed is not counted."""
        return self.total - self.memory.vectors * (self.vectors == "auto")

    @property
    def mapped(self) -> int:
        """Bytes of the mapped files of a device: page cache, which the system can reclaim."""
        return _share(self.sizes.files, self.devices)

    @property
    def read(self) -> int:
        """Bytes of base and task vectors that a device reads per step, for the merge and the backwards."""
        passes = 1 if self.schedule.keep else self.backwards
        return _share(self.sizes.vectors + self.sizes.learned * passes, self.devices)

    @property
    def exchanged(self) -> int:
        """Bytes that a device receives per step: per backward, weights twice and gradients once."""
        return 3 * self.backwards * self.sizes.weights * (self.devices - 1) // self.devices

    @property
    def seconds(self) -> Mapping[str, float]:
        """Seconds per step, by purpose, each alone."""
        rows = {
            "forward and backward": self.dry_run.flops / (self.device.flops * self.device.use),
            "merge and coefficient gradient": max(self.read / self.device.bandwidth, self._sending),
        }
        if self.devices > 1:
            rows["exchange"] = self.exchanged / (self.device.exchange or self.device.bandwidth)
        return rows

    @property
    def step_seconds(self) -> float:
        """Seconds of a step whose task vectors are sent beside its forwards and backwards."""
        computing = self.seconds["forward and backward"]
        own = Computing(computing, self.backwards, self.schedule.recompute, whole=self.devices > 1)
        passes = 1 if self.schedule.keep else self.backwards
        merge = self._pass(self.sizes.read, sends=not self.one_pass)
        merging = merging_seconds(own, merge, self._pass(self.sizes.read_twice), passes)
        return computing + merging + self.seconds.get("exchange", 0.0)

    def _pass(self, names: Iterable[str], sends: bool = True) -> Pass:
        """A pass over the base and task vectors of these parameters."""
        sizes = {name: _share(self.sizes.read.get(name, 0), self.devices) for name in names}
        return Pass.of(sizes, self.residency.at("device"), self.device.bandwidth, self.device.link * sends)

    @property
    def _sending(self) -> float:
        """Seconds per step of the link, beside which the passes run."""
        return self.residency.sent / self.device.link if self.device.link else 0.0

    def rows(self) -> list[list[str]]:
        """The plan as table cells: quantity, value, remark."""
        device = self.device
        rows = [[caption, size, ""] for caption, size in self.memory.rows()]
        rows[-1][2] = f"of {format_size(device.memory)}" if device.memory else ""
        rows.append(["mapped files", format_size(self.mapped), "page cache, not counted"])
        rows.append(["base and task vectors", str(self.residency), f"vectors: {self.vectors}"])
        rows.append(["read of them per step", format_size(self.read), f"{self.backwards} backwards"])
        if device.link:
            rows.append(["sent of them per step", format_size(self.residency.sent), "over the device's link"])
        if self.devices > 1:
            rows.append(["communicated per step", format_size(self.exchanged), "as FSDP of one model"])
        rows.append(["computed per step", f"{self.dry_run.flops / 1e12:.3g} TFLOP", "matrix products"])
        rows += [[name, f"{seconds:.3g} s", device.name] for name, seconds in self.seconds.items()]
        remark = "sending beside computing" if self._sending else "without overlap"
        return [*rows, ["time per step", f"{self.step_seconds:.3g} s", remark]]

    def title(self) -> str:
        """A one-line title."""
        sizes = self.sizes
        devices = f"{self.devices} x " if self.devices > 1 else ""
        return (
            f"{sizes.parameters:,} weights, {sizes.experts} experts, {sizes.coefficients:,} coefficients; "
            f"{self.schedule}; {devices}{self.device.name}"
        )


def _share(count: int, devices: int) -> int:
    """One device's share of `total` bytes, rounded up."""
    return -(-count // devices)
