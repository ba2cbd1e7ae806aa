"""`evaluate --controls`: its rows, their differences from the learned merge, and where it is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import trainmerge as tm
from tests.world import LABELS, recipe, write_world
from trainmerge.cli import main
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.evaluate import evaluate_run
from trainmerge.evaluate.controls import FRESH, SEEDS, behind_learned
from trainmerge.evaluate.fresh_adapter import RATE, STEPS, FreshAdapter
from trainmerge.fitting.held_out import HeldOutJudge
from trainmerge.model.adapted import adapted, new_changes
from trainmerge.model.resident import load_resident
from trainmerge.run.folder import RunFolder
from trainmerge.run.open_run import open_run
from trainmerge.run.recipe_files import calibration_files


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge whose experts all have the coefficient 0.3."""
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    merge = recipe(root)
    module = tm.MergeModule(merge, workspace=str(root / "run/workspace"))
    data = tm.Calibration(calibration_files(merge), merge.base, max_length=16)
    trainer = tm.make_trainer(root / "run", max_steps=0, accelerator="cpu")
    return tm.fit(module, data, trainer, root / "run").path


def test_controls_are_scored_beside_the_merge(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--no-compare", "--controls", "--limit", "20"]) == 0
    printed = capsys.readouterr().out
    written = json.loads((run / "evaluation.json").read_text())
    assert [*written] == ["learned", *(f"random {seed}" for seed in SEEDS), "shuffled", FRESH]
    assert all(row in printed for row in written)
    assert "paired bootstrap" in printed


def test_equal_coefficients_shuffled_are_the_same_merge(run: Path) -> None:
    found = evaluate_run(run, limit=20, compare=False, controls=True)
    for task in LABELS:
        assert torch.equal(found.rows["shuffled"][task].outcomes, found.rows["learned"][task].outcomes)
    gaps = behind_learned(found)
    assert gaps["shuffled"] == (0.0, 0.0, 0.0)
    assert gaps["shuffled"].noise
    mean = found.means()
    for seed in SEEDS:
        assert gaps[f"random {seed}"].worse_by == pytest.approx(mean["learned"] - mean[f"random {seed}"])


def test_a_checkpoint_has_no_controls(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = run.parent / "base"
    assert main(["evaluate", str(base), "--recipe", str(run), "--controls"]) != 0
    assert "name the run" in capsys.readouterr().err


def fresh(run: Path) -> FreshAdapter:
    recipe, coefficients, opened = open_run(folder := RunFolder(run))
    resident = load_resident(recipe, opened, coefficients, Tokenizer(recipe.base, 16))
    resident.merged.materialise()
    return FreshAdapter.of(folder, recipe, opened, resident)


def test_an_adapter_learns_the_experts_outputs(run: Path) -> None:
    """Beside a run without steps: alignment, on its own examples."""
    own = fresh(run)
    assert own.steps == STEPS
    assert own.objective == tm.Alignment()
    assert [len(examples) for examples in own.data.examples] == [40] * len(LABELS)
    held = HeldOutJudge(own.resident, own.objective, own.data, own._records(run / "told"))
    before = held.base_losses
    with own.learned():
        after = held._losses()
    assert after.sum() < 0.2 * before.sum()
    assert torch.equal(own.resident.merged.coefficients(), open_run(RunFolder(run))[1]())


def test_its_first_step_is_adams(run: Path) -> None:
    """lr * sign of the gradient; `down` has none while `up` is 0."""
    own = replace(fresh(run), steps=1)
    changes = new_changes(own.resident.merged, 2, seed=0)
    drawn = {name: change.down.detach().clone() for name, change in changes.items()}
    with adapted(own.resident.merged, changes):
        own._learn([*changes.values()], own._records(run / "told"))
    for name, change in changes.items():
        assert torch.equal(change.down, drawn[name])
        moved = change.up.detach().abs()
        assert float(moved.max()) <= RATE * (1 + 1e-5)
    assert max(float(change.up.detach().abs().max()) for change in changes.values()) > 0.9 * RATE


def test_without_examples_the_other_controls_stay(run: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(run, tmp_path / "run"))
    content = yaml.safe_load((moved / "recipe.yaml").read_text())
    for expert in content["recipe"]["experts"].values():
        expert["calibration"] = str(tmp_path / "lost.jsonl")
    (moved / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.warns(UserWarning, match="without a fresh LoRA"):
        found = evaluate_run(moved, limit=5, compare=False, controls=True)
    assert "random 1" in found.rows
    assert FRESH not in found.rows
