"""A fit's schedule, and the room for its task vectors, by the plan of a step: before it begins."""

import warnings
from dataclasses import replace

import torch

from trainmerge.data.calibration import Calibration
from trainmerge.fitting.memory_budget import plan_within
from trainmerge.fitting.module import MergeModule
from trainmerge.fitting.plan_fit import Precision
from trainmerge.fitting.vector_bytes import vector_bytes
from trainmerge.model.residency import Room, Share, reside
from trainmerge.plan.devices import Device, of_card
from trainmerge.plan.plan import USABLE, Plan
from trainmerge.system.memory import available


def check_held(module: MergeModule, devices: int = 1) -> None:
    """Raise ValueError if base and task vectors that a setting holds in memory are larger than what is free.

    `devices` share them.
    """
    if (free := available()) is not None and module.settings.vectors in ("device", "host"):
        shares = {name: Share(-(-count // devices)) for name, count in vector_bytes(module).items()}
        reside(module.settings.vectors, shares, Room(free, free))


def plan_on(
    module: MergeModule,
    data: Calibration,
    precision: Precision,
    device: Device,
    devices: int = 1,
    used: int = 0,
    processes: int = 0,
) -> Plan | None:
    """Choose the module's schedule, and find the room for its task vectors on a device of known memory.

    The schedule depends on the whole memory, so that a resumed run has the same; the room leaves out the
    `used` bytes of others. `devices` share the model, `processes` the examples (`plan_fit`). A model that
    cannot be planned is fitted all the same: with the schedule of least memory, from files; then there is no
    plan to return.

    Raises:
        ValueError: there is no room where `model.vectors` asks for it.
    """
    limit = int(USABLE * device.memory)
    try:
        plan = plan_within(module, data, precision, limit, device, devices, processes)
    except ValueError as error:
        if module.settings.vectors not in ("auto", "file"):
            raise
        warnings.warn(f"no plan of this fit, so task vectors stay in their files: {error}", stacklevel=2)
        return None
    plan = replace(plan, limit=max(1, limit - used))
    module.schedule, module.room = plan.schedule, plan.room
    return plan


def used_of(device: torch.device) -> int:
    """Bytes of a GPU that are in use, by other processes and by this one's tensors."""
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, int(total - free - cached))


def card_of(device: torch.device, processes: int) -> Device:
    """A GPU of this machine, whose host memory so many processes share."""
    properties = torch.cuda.get_device_properties(device)
    return of_card(properties.name, properties.total_memory, (available() or 0) // processes)
