"""Run folders from before the wings (commit 76cb42d) resume, export, evaluate and are drawn as they were.

Their files name plug-ins by paths of modules that have moved since. Numbers are compared with those of that
commit within tolerances for another processor (`tests/tolerances.py`).
"""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import trainmerge as tm
from tests.tolerances import assert_within
from trainmerge.cli import main

OLD = Path(__file__).parent / "fixtures" / "old_runs"
RUNS = ("middle", "finished", "ties", "heads", "teachers")
STEPS, LATER = 10, 13  # what the configurations have, and what `expected` has for all but `middle`


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the fixtures, which all paths in them are relative to."""
    shutil.copytree(OLD, tmp_path / "merges")
    monkeypatch.chdir(tmp_path / "merges")
    return tmp_path / "merges"


@pytest.mark.parametrize("name", RUNS)
def test_it_goes_on_to_where_it_would_have_ended(old: Path, name: str) -> None:
    run = old / "runs" / name
    before = {file.name: file.read_bytes() for file in run.glob("workspace/*")}
    steps = STEPS if name == "middle" else LATER
    arguments = ["fit", "--config", f"configs/{name}.yaml", "--run", f"runs/{name}"]
    assert main([*arguments, "--trainer.max_steps", str(steps)]) == 0
    expected = load_file(old / "expected" / f"{name}.safetensors")
    learned = tm.load_coefficients(run / "coefficients.safetensors")().detach()
    assert_within(learned, expected["coefficients"], expected["tolerance"], name)
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == list(
        range(steps)
    )
    found = {file.name: file.read_bytes() for file in run.glob("workspace/*")}
    assert found == before, "what the old run had made is not found again"


@pytest.mark.parametrize("name", RUNS)
def test_its_own_configuration_starts_it_again(old: Path, name: str) -> None:
    assert main(["fit", "--config", f"runs/{name}/config.yaml"]) == 0
    assert (old / "runs" / name / "checkpoints" / f"step-{STEPS}.ckpt").exists()
    written = yaml.safe_load((old / "runs" / name / "config.yaml").read_text())
    assert not [
        path for path in class_paths(written) if path.startswith("trainmerge.") and path.count(".") > 1
    ]


def class_paths(content: object) -> list[str]:
    if isinstance(content, list):
        return [path for item in content for path in class_paths(item)]
    if isinstance(content, dict):
        own = [content["class_path"]] if "class_path" in content else []
        return own + class_paths(list(content.values()))
    return []


@pytest.mark.parametrize("name", RUNS)
def test_it_exports_what_it_exported(old: Path, name: str) -> None:
    out = tm.export_run(f"runs/{name}", "merged")
    wanted, found = (
        load_file(old / "expected" / f"{name}-export.safetensors"),
        load_file(out / "model.safetensors"),
    )
    assert {key for key in wanted if not key.startswith("tolerance/")} == found.keys()
    for key, weight in found.items():
        assert_within(weight, wanted[key], wanted[f"tolerance/{key}"], f"{name}: {key}")
    assert tm.verify_export(f"runs/{name}", out)


@pytest.mark.usefixtures("old")
@pytest.mark.parametrize("name", RUNS)
def test_it_is_scored_drawn_and_looked_at(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    scores = tm.evaluate_run(f"runs/{name}", compare=False)
    assert list(scores.rows) == ["learned"]
    page = tm.write_report(f"runs/{name}")
    assert page.is_file()
    tm.inspect_path(Path("runs") / name)
    assert "coefficients" in capsys.readouterr().out


@pytest.mark.usefixtures("old")
@pytest.mark.parametrize("name", RUNS)
def test_its_first_configuration_is_looked_at(name: str) -> None:
    tm.inspect_path(Path("configs") / f"{name}.yaml", weights="no")


@pytest.mark.usefixtures("old")
def test_a_point_of_its_front_is_exported() -> None:
    out = tm.export_point("runs/teachers", 0, "merged")
    assert (out / "model.safetensors").exists()


@pytest.mark.usefixtures("old")
def test_an_old_export_is_scored_and_looked_at() -> None:
    assert main(["evaluate", "exports/ties"]) == 0
    assert main(["inspect", "exports/ties"]) == 0


def test_an_objective_is_named_by_an_old_path_on_the_command_line(old: Path) -> None:
    arguments = ["fit", "--config", "configs/ties.yaml", "--run", "runs/new", "--trainer.max_steps", "1"]
    named = [
        "--model.objective",
        "trainmerge.objectives.alignment.Alignment",
        "--model.objective.hidden",
        "0.5",
    ]
    constraint = ["--model.constraint=trainmerge.constraints.Free"]
    assert main([*arguments, *named, *constraint]) == 0
    manifest = json.loads((old / "runs/new/manifest.json").read_text())
    assert manifest["objective"]["class_path"] == "trainmerge.Alignment"
    assert manifest["constraint"]["class_path"] == "trainmerge.Free"
