"""A fit's schedule, and the room for its task vectors, by the plan of a step: before it begins."""

import warnings

import torch

from trainmerge.data.calibration import Calibration
from trainmerge.fitting.memory_budget import plan_within
from trainmerge.fitting.module import MergeModule
from trainmerge.fitting.plan_fit import Precision, read_bytes
from trainmerge.model.residency import Room, Share, reside
from trainmerge.plan.devices import Device, of_card
from trainmerge.plan.plan import USABLE
from trainmerge.system.memory import available


def check_held(module: MergeModule, devices: int = 1) -> None:
    """Raise ValueError if base and task vectors that a setting holds in memory are larger than what is free.

    `devices` share them.
    """
    if (free := available()) is not None and module.settings.vectors in ("device", "host"):
        shares = {name: Share(-(-count // devices)) for name, count in read_bytes(module).items()}
        reside(module.settings.vectors, shares, Room(free, free))


def plan_on(
    module: MergeModule,
    data: Calibration,
    precision: Precision,
    device: Device,
    devices: int = 1,
) -> None:
    """Choose the module's schedule, and find the room for its task vectors on a device of known memory.

    A model that cannot be planned is fitted all the same: with the schedule of least memory, from files.

    Raises:
        ValueError: there is no room where `model.vectors` asks for it.
    """
    limit = int(USABLE * device.memory)
    try:
        plan = plan_within(module, data, precision, limit, device, devices)
    except ValueError as error:
        if module.settings.vectors not in ("auto", "file"):
            raise
        warnings.warn(f"no plan of this fit, so task vectors stay in their files: {error}", stacklevel=2)
        return
    module.schedule, module.room = plan.schedule, plan.room


def card_of(device: torch.device, processes: int) -> Device:
    """A GPU of this machine, whose host memory so many processes share."""
    properties = torch.cuda.get_device_properties(device)
    return of_card(properties.name, properties.total_memory, (available() or 0) // processes)
