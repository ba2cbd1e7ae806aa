"""The manifest lists a run's own coefficients and snapshots; others are refused, wherever they come from."""

import json
import shutil
from pathlib import Path

import pytest

import trainmerge as tm
from tests.fitting.test_fit import fit_world
from tests.world import write_world
from trainmerge.cli import main
from trainmerge.coefficients.coefficients import save_coefficients
from trainmerge.fitting.reopen import reopen
from trainmerge.run.folder import RunFolder
from trainmerge.run.resume import resume_from
from trainmerge.run.saved import Saved, announce, listed_moments, unfinished


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    for name, steps in (("run", 2), ("other", 4)):
        fit_world(root, root / name, steps=steps)
    return root


@pytest.fixture
def run(world: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(world / "run", tmp_path / "run")))


def test_every_command_refuses_coefficients_of_another_run(
    world: Path, run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same experts and layout, so nothing but their bits tells."""
    out = run.path.parent / "out"
    assert main(["export", str(run.path), str(out)]) == 0
    shutil.copyfile(world / "other" / "coefficients.safetensors", run.coefficients)
    for words in (["export", "RUN", f"{out}2"], ["export", "RUN", str(out), "--verify"], ["evaluate", "RUN"],
                  ["report", "RUN"], ["allocate", "RUN", f"{out}.json"], ["pareto", "RUN"],
                  ["compare", "RUN", str(out)], ["inspect", "RUN"]):  # fmt: skip
        assert main([str(run.path) if word == "RUN" else word for word in words]) == 1, words
        said = capsys.readouterr()
        assert "not the coefficients that this run saved" in said.err + said.out, words


def test_an_older_manifest_lists_nothing_and_is_taken_as_it_is(world: Path, run: RunFolder) -> None:
    made = run.read_manifest()
    made.pop("saved")
    run.manifest.write_text(json.dumps(made))
    assert unfinished(run) == ""
    assert resume_from(run, "auto") == run.checkpoints / "step-2.ckpt"
    fit_world(world, run.path, steps=4)  # lists what is there from its first snapshot on
    want = tm.load_coefficients(world / "other" / "coefficients.safetensors")
    assert tm.load_coefficients(run.coefficients)().equal(want())
    assert [moment.step for moment in listed_moments(run, run.read_manifest()) or []] == [4, 2]


def test_a_snapshot_that_is_not_whole_is_passed_over(world: Path, run: RunFolder) -> None:
    """As a file system without atomic renames shows it: announced, and incomplete."""
    whole = world / "other" / "checkpoints" / "step-4.ckpt"
    (run.checkpoints / "step-4.ckpt").write_bytes(whole.read_bytes()[:100])
    announce(run, Saved(4, 4, "0" * 64, "1" * 64))
    with pytest.warns(
        UserWarning, match=r"step-4\.ckpt is not whole, so the run resumes from .*step-2\.ckpt"
    ):
        assert resume_from(run, "auto") == run.checkpoints / "step-2.ckpt"
    (run.checkpoints / "step-2.ckpt").unlink()
    with pytest.raises(ValueError, match=r"step-4\.ckpt: not a snapshot that this run saved, or damaged"):
        resume_from(run, "auto")


ENDLESS = {"step": float("inf"), "steps": 4, "coefficients": ""}  # an integer of a stranger's JSON


@pytest.mark.parametrize("saved", [3, [3], [{"step": 1}], None, [ENDLESS]])
def test_a_damaged_list_is_named(run: RunFolder, saved: object) -> None:
    run.manifest.write_text(json.dumps({**run.read_manifest(), "saved": saved}))
    with pytest.raises(ValueError, match=r"manifest\.json: its list `saved` is damaged\. Restore it"):
        tm.export_run(run.path, run.path.parent / "out")


def test_an_unfinished_run_says_its_step_at_export_in_card_and_manifest(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run.read_manifest()
    made["saved"][0]["steps"] = 80
    run.manifest.write_text(json.dumps(made))
    out = tm.export_run(run.path, run.path.parent / "out")
    assert f"{run.path} is unfinished: its coefficients are those of step 2 of 80" in capsys.readouterr().out
    assert "The run was unfinished: step 2 of 80." in (out / "README.md").read_text()
    assert json.loads((out / "trainmerge_manifest.json").read_text())["unfinished"] == "step 2 of 80"
    run.search.touch()
    assert unfinished(run) == "evaluation 2 of 80"


def test_a_finished_run_says_nothing(world: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tm.export_run(world / "run", tmp_path / "out")
    assert "unfinished" not in capsys.readouterr().out + (out / "README.md").read_text()


def test_a_missing_manifest_comes_with_a_remedy(run: RunFolder) -> None:
    run.manifest.unlink()
    with pytest.raises(FileNotFoundError, match=r"manifest\.json: no such file\. Restore it from a copy"):
        tm.export_run(run.path, run.path.parent / "out")


def test_a_manifest_without_the_modules_settings_is_named(run: RunFolder) -> None:
    made = run.read_manifest()
    made.pop("teacher_budget")
    run.manifest.write_text(json.dumps(made))
    with pytest.raises(ValueError, match=r"manifest\.json: .*it lacks teacher_budget\. Restore it"):
        reopen(run)


def test_coefficients_written_by_hand_are_refused(run: RunFolder) -> None:
    own = tm.load_coefficients(run.coefficients)
    own.reset_(own() + 1e-6)
    save_coefficients(own, run.coefficients)
    with pytest.raises(ValueError, match=r"its SHA-256 is [0-9a-f]{16}\.\.\., manifest\.json has"):
        tm.write_report(run.path)
