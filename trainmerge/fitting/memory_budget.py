"""A fit within a memory limit, or refused before it begins."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainmerge.data.calibration import Calibration
from trainmerge.fitting.module import MergeModule
from trainmerge.fitting.plan_fit import Precision, plan_fit
from trainmerge.plan.devices import Device, measured
from trainmerge.plan.fastest import StepTasks, fastest
from trainmerge.plan.micro_batches import StepSchedule
from trainmerge.plan.plan import Plan
from trainmerge.system.memory import Peak, format_size, return_freed_memory


def plan_within(
    module: MergeModule,
    data: Calibration,
    precision: Precision,
    limit: int,
    device: Device | None = None,
    devices: int = 1,
    processes: int = 0,
) -> Plan:
    """The fastest plan within `limit` bytes, with a margin; all schedules give the same gradient.

    What the module's settings leave open is chosen. If nothing fits: one task per backward, activation
    checkpointing, fewer examples per forward, in this order.

    Args:
        module: The merge to learn.
        data: The calibration data.
        precision: The fit's autocast.
        limit: Bytes of each device's memory.
        device: The device; by default this processor, measured.
        devices: The number of devices that share the model.
        processes: The number of devices that share the examples, as many or more; 0 is `devices`.

    Raises:
        ValueError: none fits; with the last plan and remedies.
    """
    device, processes = device or measured(), processes or devices
    together = module.rule is None
    # Sharded processes run the same number of forwards: a batch is split where all have as many examples.
    even = devices == 1 or data.batch_size % processes == 0
    separable = not module.objective.couples and together and even
    tasks = StepTasks(len(data.examples), -(-data.batch_size // processes), separable, together)

    def planned(schedule: StepSchedule) -> Plan:
        return plan_fit(module, data, precision, device, devices, schedule, limit, processes)

    plan, found = fastest(module.asked, tasks, planned, limit)
    if found:
        return plan
    table = "\n".join(f"  {caption}: {size}" for caption, size in plan.memory.rows())
    source = f"that a plan may use on {device.name}" if device.memory else "of `memory`"
    raise ValueError(
        f"the fit needs {format_size(plan.total)}, more than the {format_size(limit)} {source}, even with "
        f"{plan.schedule}:\n{table}\n{_remedy(module, data, device)}"
    )


@contextmanager
def watch_memory(limit: int) -> Iterator[None]:
    """Return freed memory to the system at once; print the peak anonymous memory at the end. 0: no limit."""
    if not limit:
        yield
        return
    return_freed_memory()
    with Peak(every=0.01) as peak:
        yield
    print(f"memory: {format_size(peak.highest)} at most, of {format_size(limit)}")
    if peak.highest > limit:
        warnings.warn(
            f"the fit used {format_size(peak.highest)}, over the {format_size(limit)} of `memory`: its plan "
            "was wrong; please report it with the output of `trainmerge fit ... --dry-run`",
            stacklevel=2,
        )


def _remedy(module: MergeModule, data: Calibration, device: Device) -> str:
    """Remedies that change what is learned, so only the user may choose them."""
    ways = [f"set data.max_length below {data.max_length}", "data.batch_size lower"]
    if not device.memory:
        ways.append("raise `memory`")
    elif not module.settings.sharded:
        ways.append("share the model among several devices (model.sharded)")
    if module.settings.weights == "stored" and any(
        t.dtype == torch.float32 for t in module.opened.base.tensors.values()
    ):
        ways.insert(0, "set model.weights to bfloat16, which halves model and gradients")
    return "Any of these would help: " + "; ".join(ways) + "."
