"""The gradient of a step: its scale under float16, and what is not learned."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torchjd.aggregation import PCGrad

import trainmerge as tm
from tests.world import languages_recipe, llama, nudge, write_languages, write_tokenizer
from trainmerge.coefficients.aggregation import aggregate_gradients
from trainmerge.coefficients.layout import Grouping
from trainmerge.data.steps import Steps
from trainmerge.fitting.module import MergeModule
from trainmerge.model.loss_scale import LossScale
from trainmerge.run.recipe import Recipe
from trainmerge.run.recipe_files import calibration_files

FIXED = Grouping("chunk", chunks={"*": 1, "*embed*": 0, "*norm*": 0})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_languages(tmp_path_factory.mktemp("languages"))


def build(recipe: Recipe, place: Path, **settings: object) -> tuple[MergeModule, tm.Calibration]:
    settings.setdefault("optimizer", lambda values: torch.optim.SGD(values, lr=0.1))
    module = tm.MergeModule(recipe, tm.Alignment(), workspace=str(place / "workspace"), **settings)
    return module, tm.Calibration(calibration_files(recipe), recipe.base, batch_size=2, max_length=16)


def learn(recipe: Recipe, place: Path, steps: int = 2, mixed: bool = False, **settings: object) -> Tensor:
    """The coefficients after a fit."""
    module, data = build(recipe, place, **settings)
    scaler = torch.amp.GradScaler("cpu")
    plugins = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]} if mixed else {}
    trainer = tm.make_trainer(
        place / "run", max_steps=steps, accelerator="cpu", enable_progress_bar=False, **plugins
    )
    tm.fit(module, data, trainer, place / "run")
    if mixed:
        assert trainer.strategy.precision_plugin.scaler is scaler  # borrowed for a step, and given back
    return module.coefficients().detach()


def rows_of(module: MergeModule, data: tm.Calibration) -> Tensor:
    """Each expert's gradient of the first step [m, K, G], by autograd through the whole merge."""
    module.load(data)
    merged = module.resident.merged
    merged.materialise()
    rows = []
    for batch in Steps(data.examples, data.tokenize, data.batch_size, data.seed)[0]:
        module.loss(batch).backward()
        rows.append(merged.gradient())
    return torch.stack(rows)


def test_clip_under_16_mixed_is_the_clip_of_float32(world: Path, tmp_path: Path) -> None:
    recipe = languages_recipe(world)
    wide = learn(recipe, tmp_path / "wide", clip=0.01, steps=1)
    mixed = learn(recipe, tmp_path / "mixed", clip=0.01, steps=1, mixed=True)
    assert float((wide - 0.3).norm()) == pytest.approx(1e-3, rel=1e-3)  # lr * clip
    torch.testing.assert_close(mixed - 0.3, wide - 0.3, rtol=0.05, atol=2e-5)


@pytest.mark.parametrize("optimizer", [tm.FrankWolfe, torch.optim.LBFGS])
def test_optimizers_that_call_the_closure_work_under_16_mixed(
    world: Path, tmp_path: Path, optimizer: type
) -> None:
    settings = {"optimizer": lambda values: optimizer(values), "initial": 0.5}
    if optimizer is tm.FrankWolfe:
        settings["constraint"] = tm.Simplex()
    recipe = languages_recipe(world, grouping=Grouping("task"))
    wide = learn(recipe, tmp_path / "wide", **settings)
    mixed = learn(recipe, tmp_path / "mixed", mixed=True, **settings)
    torch.testing.assert_close(mixed, wide, rtol=0, atol=0.02)


class Products(nn.Module):
    """A rule of one matrix product."""

    def forward(self, rows: Tensor) -> Tensor:
        return torch.ones(len(rows)) @ rows


@pytest.mark.parametrize(
    "settings",
    [
        {"combine": Products()},
        {"optimizer": lambda values: torch.optim.Adafactor(values, lr=0.05)},  # squares times squares
    ],
)
def test_rules_and_optimizers_compute_in_float32_under_16_mixed(
    world: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    recipe = languages_recipe(world)
    wide = learn(recipe, tmp_path / "wide", **settings)
    mixed = learn(recipe, tmp_path / "mixed", mixed=True, **settings)
    assert float((mixed - wide).norm()) < 0.02 * float((wide - 0.3).norm())


def test_a_rule_is_exact_within_autocast() -> None:
    rows = torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = aggregate_gradients(rows, Products(), 0)
    assert torch.equal(found, aggregate_gradients(rows, Products(), 0))


def test_an_overflow_is_computed_again_and_the_scale_is_in_the_snapshot(world: Path, tmp_path: Path) -> None:
    recipe = languages_recipe(world, grouping=Grouping("task"))
    module, data = build(recipe, tmp_path)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    trainer = tm.make_trainer(
        tmp_path / "run", max_steps=2, accelerator="cpu", enable_progress_bar=False,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
    )  # fmt: skip
    tm.fit(module, data, trainer, tmp_path / "run")
    scale = module.resident.merged.loss_scale
    assert 1 < scale.value < 2.0**40
    snapshot = torch.load(tmp_path / "run" / "checkpoints" / "step-2.ckpt", weights_only=True)
    assert snapshot["loss_scale"] == {"value": scale.value, "finite": 2}  # no step was lost
    torch.testing.assert_close(
        module.coefficients().detach(), learn(recipe, tmp_path / "wide"), rtol=0, atol=1e-3
    )


def write_half(root: Path) -> Recipe:
    """A float16 base with two experts that are near it."""
    base = llama().half()
    base.save_pretrained(root / "base")
    write_tokenizer(root / "base")
    for seed, name in enumerate("ab"):
        expert = copy.deepcopy(base).float()
        nudge(expert, seed, scale=2e-3)
        expert.half().save_pretrained(root / name)
        (root / f"{name}.jsonl").write_text('{"text": "good bad cat dog bird"}\n' * 4)
    return languages_recipe(root)


def test_small_gradients_of_a_float16_base_do_not_vanish(tmp_path: Path) -> None:
    recipe = write_half(tmp_path)
    light = replace(recipe, experts={n: replace(e, weight=2.0**-10) for n, e in recipe.experts.items()})
    own, small = (rows_of(*build(r, tmp_path / n)) for r, n in ((recipe, "own"), (light, "light")))
    assert bool((small != 0).all())
    torch.testing.assert_close(small * 2.0**10, own, rtol=0.05, atol=1e-3 * float(own.abs().max()))


def test_a_rule_of_conflict_sees_only_what_is_learned(world: Path, tmp_path: Path) -> None:
    recipe = languages_recipe(world, grouping=FIXED)
    module, data = build(recipe, tmp_path)
    rows, fixed = rows_of(module, data), list(module.opened.layout.fixed)
    assert fixed
    assert not rows[:, :, fixed].any()
    learned = [group for group in range(rows.shape[2]) if group not in fixed]
    everything = rows_of(*build(languages_recipe(world), tmp_path / "all"))
    torch.testing.assert_close(rows[:, :, learned], everything[:, :, learned])
    step = (0.3 - learn(recipe, tmp_path / "fit", steps=1, combine=PCGrad())) / 0.1
    torch.testing.assert_close(
        step[:, learned], aggregate_gradients(everything[:, :, learned], PCGrad(), 0), rtol=0, atol=1e-5
    )
    assert not step[:, fixed].any()


def test_clip_does_not_count_the_anchor_of_what_is_fixed(world: Path, tmp_path: Path) -> None:
    recipe = languages_recipe(world, grouping=FIXED)
    moved = learn(recipe, tmp_path, steps=1, clip=0.01, anchor=tm.Anchor(50.0, at=0.0)) - 0.3
    assert float(moved.norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_a_line_search_does_not_move_what_is_fixed(world: Path, tmp_path: Path) -> None:
    """Its second loss is at a vertex, which fixed coefficients are not."""
    recipe = languages_recipe(world, grouping=FIXED)
    module, _ = build(recipe, tmp_path, initial=0.5, constraint=tm.Simplex())
    fixed = list(module.opened.layout.fixed)
    with torch.no_grad():
        module.coefficients.raw.fill_(1.0)  # as an optimizer might, within its step
    assert bool((module.coefficients()[:, fixed] == 0.5).all())


def test_rules_combine_what_the_optimizer_moves(world: Path, tmp_path: Path) -> None:
    """Under a sigmoid that is the logit: rows are multiplied by its slope before the rule."""
    recipe = languages_recipe(world, grouping=Grouping("task"))
    settings = {"constraint": tm.Sigmoid(), "combine": PCGrad(), "initial": [0.2, 0.6]}
    module, data = build(recipe, tmp_path, **settings)
    rows, start = rows_of(module, data), module.coefficients().detach()
    want = start.logit() - 0.1 * aggregate_gradients(rows * start * (1 - start), PCGrad(), 0)
    torch.testing.assert_close(learn(recipe, tmp_path / "fit", steps=1, **settings).logit(), want)


def test_a_scale_halves_on_overflow_and_doubles_after_many_steps() -> None:
    scale = LossScale(4.0, interval=2)
    weight = nn.Parameter(torch.ones(()))
    scale(weight * 3).backward()
    assert weight.grad == 12
    assert scale.unscaled(weight.grad) == 3
    assert scale.unscaled(torch.tensor(3.0)) == 3  # nothing was scaled since
    assert not scale.settle(finite=False)
    assert (scale.settle(True), scale.value) == (True, 2.0)
    assert (scale.settle(True), scale.value) == (True, 4.0)
    for _ in range(2):
        assert not scale.settle(finite=False)
    assert scale.settle(finite=False)  # at 1 it is no overflow
    assert LossScale.of(nn.Linear(2, 2)).settle(finite=False)
    assert LossScale.of(nn.Linear(2, 2).half()).value == 2.0**16
    assert not LossScale.like(torch.amp.GradScaler("cpu", enabled=False)).active


@pytest.mark.parametrize("distance", ["squared", "mse", "normalised", "cosine"])
def test_an_expert_is_at_no_distance_from_its_exact_record(
    world: Path, tmp_path: Path, distance: str
) -> None:
    found = {}
    for record in ("bfloat16", "float32"):
        objective = tm.Alignment(0.0, hidden=1.0, layers=(1, 2), distance=distance, record=record)
        recipe = languages_recipe(world)
        module = tm.MergeModule(recipe, objective, initial=[1.0, 0.0], workspace=str(tmp_path / "w"))
        module.load(data := tm.Calibration(calibration_files(recipe), recipe.base, max_length=16))
        module.resident.merged.materialise()
        batch = Steps(data.examples, data.tokenize, 2, 0)[0][0]
        found[record] = float(module.loss(batch).detach())
    assert abs(found["float32"]) < 1e-7
    assert found["bfloat16"] > 1e-6  # the rounding of bfloat16, in its own file
