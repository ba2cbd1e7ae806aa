"""`evaluate --controls`: its rows, their differences from the learned merge, and where it is refused."""

import json
from pathlib import Path

import pytest
import torch

import trainmerge as tm
from tests.world import LABELS, recipe, write_world
from trainmerge.cli import main
from trainmerge.evaluate import evaluate_run
from trainmerge.evaluate.controls import SEEDS, behind_learned
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
    assert [*written] == ["learned", *(f"random {seed}" for seed in SEEDS), "shuffled"]
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
