"""The schedule that a plan chooses: by plans made by hand, and for a fit on a device that is not here."""

from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import trainmerge as tm
from tests.fitting.test_fit import build
from tests.stand_in import CountedLink, behind
from tests.world import languages_recipe, write_languages, write_world
from trainmerge.fitting.begin import Snapshot
from trainmerge.fitting.memory_budget import plan_within
from trainmerge.fitting.place import plan_on
from trainmerge.fitting.plan_steps import keep_schedule
from trainmerge.model import merged_weights
from trainmerge.plan.devices import Device
from trainmerge.plan.dry_run import DryRun
from trainmerge.plan.fastest import MARGIN, StepTasks, fastest
from trainmerge.plan.micro_batches import OpenSchedule, StepSchedule
from trainmerge.plan.plan import SCRATCH, Plan
from trainmerge.plan.sizes import Sizes

MIB = 1 << 20
OPEN = OpenSchedule()
TASKS = StepTasks(4, 8)
HERE = Device("none", 1e12, 1e9)
CARD = Device("none", 1e12, 1e12, link=1e9, memory=1 << 34, host=1 << 34)


def planned(model: int, activations: int, vectors: int = 0, device: Device = HERE):
    """Plans of four tasks, for a model and activations of a task in MiB, as a function of the schedule."""
    weights, read = model * MIB, (vectors or 5 * model) * MIB

    def plan(schedule: StepSchedule) -> Plan:
        share = (schedule.examples or 8) / 8
        held = int(activations * MIB * schedule.tasks * share * (0.25 if schedule.recompute else 1))
        needs = DryRun(held, held + MIB, 10**9 * (4 if schedule.recompute else 3))
        sizes = Sizes(
            1, 4, 4, weights, MIB, weights, weights, read, read, read // 8, read,
            read={str(i): read // 8 for i in range(8)}, read_twice=frozenset(map(str, range(8))),
        )  # fmt: skip
        backwards = -(-4 // schedule.tasks) * (8 // (schedule.examples or 8))
        return Plan(sizes, schedule, needs, backwards, device)

    return plan


def chosen(make, room: int, asked: OpenSchedule = OPEN, tasks: StepTasks = TASKS) -> StepSchedule | None:
    """The schedule within so many MiB beside the scratch buffers."""
    plan, found = fastest(asked, tasks, make, int(MARGIN * (room * MIB + SCRATCH + 10**4)))
    return plan.schedule if found else None


def test_one_pass_over_the_task_vectors_by_the_cheaper_memory() -> None:
    heavy, light = planned(model=100, activations=400), planned(model=400, activations=100)
    assert chosen(heavy, 10_000) == StepSchedule(1, keep=True)  # a model more
    assert chosen(light, 10_000) == StepSchedule(4)  # three tasks' activations more
    assert heavy(StepSchedule(1, keep=True)).read == light(StepSchedule(4)).read // 4


def test_less_memory_costs_passes_then_operations() -> None:
    make = planned(model=400, activations=100)
    assert chosen(make, 801) == StepSchedule(4)
    assert chosen(make, 800) == StepSchedule(2)
    assert chosen(make, 600) == StepSchedule(1)
    assert chosen(make, 500) == StepSchedule(1, recompute=True)
    assert chosen(make, 425) == StepSchedule(1, 4, recompute=True)
    assert chosen(make, 400) is None
    kept = planned(model=50, activations=400)
    assert chosen(kept, 260) == StepSchedule(1, recompute=True, keep=True)
    assert chosen(kept, 190) == StepSchedule(1, recompute=True)
    assert chosen(kept, 130) == StepSchedule(1, 4, recompute=True)


def test_what_is_set_stays_and_what_cannot_be_shared_is_not() -> None:
    make = planned(model=100, activations=400)
    assert chosen(make, 10_000, OpenSchedule(1, False)) == StepSchedule(1)
    assert chosen(make, 10_000, OpenSchedule(None, False)) == StepSchedule(4)
    assert chosen(make, 10_000, OpenSchedule(2, None)) == StepSchedule(2, keep=True)
    apart = StepTasks(4, 8, separable=False, together=False)
    assert chosen(make, 10_000, OPEN, apart) == StepSchedule(1)
    assert chosen(make, 150, OPEN, apart) is None  # nor may its batch be split


def test_behind_a_link_one_backward_hides_more() -> None:
    """Where sending takes about as long as computing, it is worth the activations of all tasks."""
    slow = Device("none", 5e9, 1e12, link=1e9, memory=1 << 40, host=1 << 40)
    make = planned(model=100, activations=400, device=slow)
    sent = {how: replace(make(how), vectors="host") for how in (StepSchedule(1, keep=True), StepSchedule(4))}
    kept, turns = sent.values()
    assert turns.read == kept.read
    assert turns.step_seconds < 0.8 * kept.step_seconds
    plan, fits = fastest(OPEN, TASKS, lambda how: replace(make(how), vectors="host"), 10_000 * MIB)
    assert (plan.schedule, fits) == (StepSchedule(4), True)


def test_memory_goes_to_task_vectors_before_gradients_that_save_less() -> None:
    """Behind a link one more model leaves no room for the task vectors, which save more."""
    device = Device("none", 1e12, 1e12, link=1e9, memory=int(800 * MIB / 0.9), host=1 << 34)
    make = planned(model=300, activations=10, vectors=320, device=device)
    assert chosen(make, 10_000) == StepSchedule(4)
    assert make(StepSchedule(4)).residency.sent == 0
    assert make(StepSchedule(1, keep=True)).residency.sent > 0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    return root


def test_a_fit_takes_the_plan_of_its_device(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = CountedLink()
    monkeypatch.setattr(merged_weights, "link_to", behind(link))
    module, data = build(world, tmp_path / "run")
    assert module.schedule == StepSchedule(1)
    plan = plan_on(module, data, nullcontext, CARD)
    assert plan is not None
    assert plan.schedule == module.schedule  # what a dry run shows
    assert plan.read == 2 * plan.sizes.vectors  # one pass for all tasks
    replicated = plan_on(module, data, nullcontext, CARD, processes=data.batch_size)
    assert replicated is not None
    assert replicated.memory.model == plan.memory.model
    assert replicated.memory.activations < plan.memory.activations  # of one example
    trainer = tm.make_trainer(tmp_path / "run", max_steps=2, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, data, trainer, tmp_path / "run")
    assert plan.memory.vectors == pytest.approx(link.alive, rel=0.05)
    assert {*link.sends.values()} == {1}


def test_without_room_or_a_plan(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, data = build(world, tmp_path / "auto", combine=torch.nn.Identity())  # few ways to plan
    small = Device("none", 1e12, 1e12, link=1e9, memory=1 << 20)
    with pytest.warns(UserWarning, match="task vectors stay in their files: the fit needs"):
        plan_on(module, data, nullcontext, small)
    assert (module.schedule, module.room) == (StepSchedule(1), None)
    with pytest.raises(
        ValueError, match=r"that a plan may use on none, even with(.|\n)*model\.sharded"
    ) as told:
        plan_within(module, data, nullcontext, 1 << 20, small)
    assert "`memory`" not in str(told.value)
    module, data = build(world, tmp_path / "device", vectors="device")
    monkeypatch.setattr("trainmerge.fitting.place.available", lambda: 1000)
    trainer = tm.make_trainer(tmp_path / "run", max_steps=2, accelerator="cpu", enable_progress_bar=False)
    with pytest.raises(ValueError, match=r"model.vectors: .* 1000 B are free on the device"):
        tm.fit(module, data, trainer, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_its_schedule(tmp_path: Path) -> None:
    """Another schedule would sum the same gradient in another order."""
    write_languages(tmp_path)
    given = languages_recipe(tmp_path)
    kept = StepSchedule(2, examples=1, keep=True)
    for asked, planned, content, want in (
        ({}, False, {"schedule": asdict(kept)}, kept),
        (
            {"tasks_per_backward": 1},
            False,
            {"schedule": asdict(kept)},
            StepSchedule(),
        ),  # set anew by the user
        ({}, False, {}, StepSchedule()),  # of version 0.1.0
        ({}, True, {}, StepSchedule(3)),  # of that version, under a limit
    ):
        module = tm.MergeModule(given, workspace=str(tmp_path / "workspace"), **asked)
        module.schedule = StepSchedule(3) if planned else StepSchedule()
        keep_schedule(module, Snapshot(tmp_path, content), planned)
        assert module.schedule == want
