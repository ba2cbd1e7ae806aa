"""A fit's schedule, and where its task vectors are, by the plan."""

import pytorch_lightning as pl

from trainmerge.data.calibration import Calibration
from trainmerge.fitting.begin import Snapshot
from trainmerge.fitting.memory_budget import plan_within
from trainmerge.fitting.module import MergeModule
from trainmerge.fitting.place import card_of, check_held, plan_on, used_of
from trainmerge.fitting.trainer import precision_of
from trainmerge.plan.micro_batches import StepSchedule
from trainmerge.plan.plan import Plan
from trainmerge.system.memory import format_size


def cut_steps(module: MergeModule, data: Calibration, trainer: pl.Trainer, limit: int) -> None:
    """Split the module's step until its plan fits into `limit` bytes.

    Raises:
        ValueError: no plan fits, or the fit is on a GPU or sharded.
    """
    if trainer.strategy.root_device.type != "cpu":
        raise ValueError("--memory works on CPU only; on a GPU, --dry-run shows the plan")
    if module.settings.sharded and trainer.world_size > 1:
        raise ValueError(
            "--memory does not work with model.sharded, whose processes need the same micro-batches: leave "
            "it out"
        )
    if trainer.max_steps:
        plan = plan_within(module, data, precision_of(trainer), limit)
        module.schedule = plan.schedule
        print(f"memory: {format_size(plan.total)} planned, of {format_size(limit)}: {plan.schedule}")


def plan_steps(module: MergeModule, data: Calibration, trainer: pl.Trainer) -> Plan | None:
    """Choose schedule and places for the trainer's device (`plan_on`); a CPU has its settings' own.

    Returns the plan of a GPU; None where there is none.

    Raises:
        ValueError: there is no room where `model.vectors` asks for it.
    """
    device = trainer.strategy.root_device
    devices = module.settings.shards(trainer.world_size, trainer.num_devices)
    if device.type == "cuda":
        card = card_of(device, trainer.num_devices)
        sharing = devices, used_of(device), trainer.world_size
        return plan_on(module, data, precision_of(trainer), card, *sharing)
    check_held(module, devices)
    return None


def keep_schedule(module: MergeModule, snapshot: Snapshot, planned: bool) -> None:
    """A resumed run goes on with its own schedule, whose sums it began with, unless a setting changes it.

    Snapshots of version 0.1.0 have none: theirs was the one of least memory, or `planned` for a limit.
    """
    kept = snapshot.content.get("schedule")
    if kept is None:
        module.schedule = module.schedule if planned else module.asked.least
        return
    schedule = StepSchedule(**kept)
    if module.asked.tasks in (None, schedule.tasks) and module.asked.keep in (None, schedule.keep):
        module.schedule = schedule
