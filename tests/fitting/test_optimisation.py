"""Optimizers, schedules and run folders that a fit refuses before it makes its folder."""

import math
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

import trainmerge as tm
from tests.world import languages_recipe, write_languages
from trainmerge.fitting.optimisation import check_optimisation
from trainmerge.run.recipe_files import calibration_files


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_languages(tmp_path_factory.mktemp("languages"))


def start(world: Path, run: Path, trainer: pl.Trainer | None = None, **settings: Any) -> None:
    recipe = languages_recipe(world)
    module = tm.MergeModule(recipe, **{"objective": tm.Alignment(), **settings}, workspace=str(run / "w"))
    data = tm.Calibration(calibration_files(recipe), recipe.base, batch_size=2, max_length=16)
    trainer = trainer or tm.make_trainer(run, max_steps=2, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, data, trainer, run)


class Bounded(torch.optim.SGD):
    """An optimizer with a bound that is infinite by default, as Prodigy's growth rate."""

    def __init__(self, values: Any, lr: float = 0.1, growth_rate: float = math.inf) -> None:
        super().__init__(values, lr=lr)
        for group in self.param_groups:
            group["growth_rate"] = growth_rate


class Halving:
    """A schedule that Lightning would accept and nobody would step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None: ...

    def step(self) -> None: ...

    def state_dict(self) -> dict[str, float]:
        return {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_scheduler": ReduceLROnPlateau}, "ReduceLROnPlateau waits for a measure"),
        ({"lr_scheduler": Halving}, r"Halving is no torch\.optim\.lr_scheduler\.LRScheduler"),
        ({"optimizer": lambda values: torch.optim.SGD(values, lr=math.inf)}, r"optimizer\.lr must be finite"),
        ({"optimizer": lambda values: Bounded(values, growth_rate=math.nan)}, "growth_rate must be a number"),
        (
            {"objective": tm.Alignment(hidden=1.0, layers=[9])},
            r"no layer 9; the model has 2, so choose from 0",
        ),
        ({"objective": tm.Alignment(hidden=1.0, layers=[-4])}, r"or from -1 \(the last\) to -3"),
        ({"objective": None}, r"model\.objective: null is no value; remove the key for its default"),
        ({"objective": None, "anchor": None}, r"model\.objective, model\.anchor: null is no value"),
        ({"combine": torch.nn.Linear(2, 2)}, r"model\.combine: Linear does not work: RuntimeError: mat1 and"),
        (
            {"combine": torch.nn.Identity()},
            r"model\.combine: Identity does not work: .* maps \[m, n\] to \[n\]",
        ),
        (
            {"lr_scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=0)},
            r"model\.lr_scheduler: StepLR does not work: ZeroDivisionError",
        ),
        (
            {"lr_scheduler": partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1.0)},
            r"model\.lr_scheduler: OneCycleLR does not work: You must define either total_steps",
        ),
        (
            {"optimizer": partial(torch.optim.SGD, lr=-1.0)},
            r"model\.optimizer: SGD does not work: Invalid learning rate: -1\.0",
        ),
        (
            {"optimizer": torch.optim.SparseAdam},
            r"model\.optimizer: SparseAdam does not work: RuntimeError: SparseAdam does not support dense",
        ),
    ],
)
def test_settings_are_refused_before_the_run_folder_is_made(
    world: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        start(world, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("clip", -1.0), ("clip", math.nan), ("clip", True), ("initial", math.nan), ("initial", [0.3, math.inf]),
     ("initial", ""), ("keep_better", 1), ("tasks_per_backward", 0), ("teacher_budget", 0), ("weights", "x"),
     ("subspace", -1)],
)  # fmt: skip
def test_arguments_of_the_module(world: Path, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        tm.MergeModule(languages_recipe(world), **{name: value})


def test_a_bound_of_an_optimizer_may_be_infinite(world: Path, tmp_path: Path) -> None:
    start(world, tmp_path / "run", optimizer=Bounded)
    assert (tmp_path / "run" / "coefficients.safetensors").is_file()


def test_two_run_folders_are_refused(world: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    trainer = tm.make_trainer(one, max_steps=1, accelerator="cpu", enable_progress_bar=False)
    with pytest.raises(ValueError, match=r"writes into .*one, and the fit into .*other: give make_trainer"):
        start(world, other, trainer)
    with pytest.raises(ValueError, match=r"make it with trainmerge\.make_trainer"):
        start(world, other, pl.Trainer(max_steps=1, accelerator="cpu", logger=False))
    assert not one.exists()
    assert not other.exists()


class Mean(torch.nn.Module):
    """A rule that counts its uses."""

    def __init__(self) -> None:
        super().__init__()
        self.uses = 0

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.uses += 1
        return rows.mean(dim=0)


def test_the_rehearsal_leaves_no_trace(world: Path, tmp_path: Path) -> None:
    """Neither in the coefficients, the rule's own state nor the random numbers."""
    module = tm.MergeModule(languages_recipe(world), tm.Alignment(), combine=Mean(), workspace=str(tmp_path))
    before, random = module.coefficients.raw.detach().clone(), torch.get_rng_state()
    check_optimisation(module)
    assert module.coefficients.raw.equal(before)
    assert module.coefficients.raw.grad is None
    assert module.rule is not None
    assert module.rule.uses == 0
    assert torch.get_rng_state().equal(random)


def test_numbers_that_no_machine_can_count_to(world: Path, tmp_path: Path) -> None:
    recipe = languages_recipe(world)
    with pytest.raises(ValueError, match=r"trainer\.max_steps must be in \[-1, "):
        tm.make_trainer(tmp_path / "run", max_steps=10**30)
    for name in ("max_length", "batch_size"):
        with pytest.raises(ValueError, match=rf"data\.{name} must be in \[1, "):
            tm.Calibration(calibration_files(recipe), recipe.base, **{name: 10**30})


def test_a_trainer_that_needs_an_absent_library(tmp_path: Path) -> None:
    if find_spec("torch_xla"):
        pytest.skip("torch_xla is installed")
    with pytest.raises(ValueError, match=r"trainer: \{'accelerator': 'tpu'\} needs a library: .*torch_xla"):
        tm.make_trainer(tmp_path / "run", max_steps=1, accelerator="tpu")
