"""Fits whose merges are written in the backward before: what reads weights between steps, what falls back."""

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn
from torchjd.aggregation import PCGrad

import trainmerge as tm
from tests.contracts import assert_same_bits
from tests.stand_in import CountedLink, behind
from tests.world import languages_recipe, nudge, write_languages
from trainmerge.fitting import module_steps, steps
from trainmerge.fitting.plan_fit import plan_fit
from trainmerge.model import merged_weights
from trainmerge.plan.devices import Device
from trainmerge.run.recipe_files import calibration_files

STEPS = 4
CARD = Device("none", 1e12, 1e12, link=1e9)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_languages(tmp_path_factory.mktemp("languages"), layers=6)


@pytest.fixture(autouse=True)
def link(monkeypatch: pytest.MonkeyPatch) -> CountedLink:
    made = CountedLink()
    monkeypatch.setattr(merged_weights, "link_to", behind(made))
    return made


def build(
    world: Path, run: Path, held_out: float = 0.0, **settings: Any
) -> tuple[tm.MergeModule, tm.Calibration]:
    settings = {"optimizer": lambda own: torch.optim.Adam(own, lr=0.05), "keep_gradients": True, **settings}
    recipe = languages_recipe(world)
    module = tm.MergeModule(
        recipe, tm.JensenShannon(), workspace=str(run.parent / "workspace"), vectors="host", **settings
    )
    files = calibration_files(recipe)
    return module, tm.Calibration(files, recipe.base, batch_size=2, max_length=16, held_out=held_out)


def learn(
    world: Path, run: Path, count: int = STEPS, callbacks: list[Callback] | None = None, **settings: Any
) -> tm.MergeModule:
    module, data = build(world, run, 0.5 if callbacks else 0.0, **settings)
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "save_every": 1}
    tm.fit(module, data, tm.make_trainer(run, max_steps=count, callbacks=callbacks, **quiet), run)
    return module


class Reads(Callback):
    """Runs the model after every step, without a merge of its own, as a user's callback may."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, _: pl.Trainer, module: tm.MergeModule, *__: Any) -> None:
        merged = module.resident.merged
        before = [own.detach().clone() for own in merged.module.parameters()]
        with torch.no_grad():
            merged.module(torch.arange(6)[None])
        merged.standing.forget(merged.parameters)
        merged.materialise()
        for own, now in zip(before, merged.module.parameters(), strict=True):
            assert_same_bits(own, now.detach())
        self.count += 1


def test_whoever_reads_after_a_step_sees_the_merge_of_its_coefficients(world: Path, tmp_path: Path) -> None:
    reads, judge = Reads(), tm.StopOnHeldOut(every=1, patience=9)
    module = learn(world, tmp_path / "one", callbacks=[reads, judge])
    assert module.resident.merged.standing.on
    assert reads.count == STEPS
    assert len(judge.recovered) == STEPS + 1


def test_stopping_by_held_out_examples_is_the_same(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = tm.StopOnHeldOut(every=1, patience=9)
    learn(world, tmp_path / "one", callbacks=[one])
    monkeypatch.setattr(steps, "foresight", lambda *_: None)
    two = tm.StopOnHeldOut(every=1, patience=9)
    learn(world, tmp_path / "two", callbacks=[two])
    assert one.recovered == two.recovered


@pytest.mark.parametrize("settings", [{}, {"on_policy": tm.OnPolicy(every=2, prompt=2, length=4)}], ids=str)
def test_a_killed_fit_goes_on_with_the_same_bits(
    settings: dict[str, Any], world: Path, tmp_path: Path, link: CountedLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn(world, tmp_path / "parts", count=2, **settings)
    link.restart()
    parts = learn(world, tmp_path / "parts", **settings)
    one = link.bytes
    whole = learn(world, tmp_path / "one", **settings)
    monkeypatch.setattr(steps, "foresight", lambda *_: None)
    learn(world, tmp_path / "first", count=2, **settings)
    link.restart()
    two = learn(world, tmp_path / "two", **settings)
    assert parts.resident.merged.standing.on
    for got in (parts, whole):
        assert_same_bits(got.coefficients().detach(), two.coefficients().detach())
    assert one < link.bytes


@pytest.mark.parametrize(
    "settings",
    [{"clip": 0.01}, {"combine": PCGrad(), "keep_gradients": False}, {"optimizer": torch.optim.LBFGS}],
    ids=["clip", "combine", "LBFGS"],
)
def test_a_step_that_needs_the_whole_gradient_takes_two_passes(
    settings: dict[str, Any], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = learn(world, tmp_path / "one", count=2, **settings)
    assert not one.resident.merged.standing.on
    monkeypatch.setattr(steps, "foresight", lambda *_: None)
    two = learn(world, tmp_path / "two", count=2, **settings)
    assert_same_bits(one.coefficients().detach(), two.coefficients().detach())


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_the_plan_counts_what_a_step_sends(
    clip: float, keep: bool, world: Path, tmp_path: Path, link: CountedLink
) -> None:
    settings = {"clip": clip, "keep_gradients": keep}
    plan = plan_fit(*build(world, tmp_path / "plan", **settings), device=CARD)
    sent = []
    for count in (1, 2, 3):  # the first one records the experts too
        learn(world, tmp_path / str(count), count=count, **settings)
        sent.append(link.bytes)
        link.restart()
    turns = plan.memory.prefetched * (2 if clip else 0)  # of two passes, what both turns find there
    assert sent[2] - sent[1] == pytest.approx(plan.residency.sent - turns, rel=0.05)


def test_a_module_in_memory(link: CountedLink, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(6)))
    experts = {name: copy.deepcopy(base) for name in "ab"}
    loaders = {name: [torch.randn(4, 6) for _ in range(3)] for name in "ab"}
    for seed, expert in enumerate(experts.values()):
        nudge(expert, seed)

    def fitted() -> tuple[tm.FittedModule, int]:
        link.restart()
        loss = lambda logits, _: logits.logsumexp(-1).mean()  # noqa: E731
        found = tm.fit_module(base, experts, loaders, loss, steps=STEPS)
        return found, link.bytes

    one, less = fitted()
    monkeypatch.setattr(module_steps, "foresight", lambda *_: None)
    two, more = fitted()
    assert_same_bits(one.coefficients().detach(), two.coefficients().detach())
    for own, want in zip(one.module.parameters(), two.module.parameters(), strict=True):
        assert_same_bits(own.detach(), want.detach())
    assert less < more
