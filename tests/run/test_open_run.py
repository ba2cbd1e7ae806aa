"""One door to a run folder: files of different runs, or damaged ones, are refused by every command."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import trainmerge as tm
from trainmerge.coefficients.coefficients import Coefficients, save_coefficients
from trainmerge.run.folder import RunFolder
from trainmerge.run.open_run import open_run, read_run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(finished, tmp_path / "run")))


def edit(run: RunFolder, **changes: object) -> None:
    content = yaml.safe_load(run.recipe.read_text())
    content["recipe"] |= changes
    run.recipe.write_text(yaml.safe_dump(content, sort_keys=False))


def test_a_run_opens(run: RunFolder) -> None:
    found, coefficients, manifest = read_run(run)
    assert list(found.experts) == list(coefficients.experts) == manifest["experts"]
    assert open_run(run)[0] == found


def test_held_out_tasks_and_paths_may_change(run: RunFolder, tmp_path: Path) -> None:
    base = yaml.safe_load(run.recipe.read_text())["recipe"]["base"]
    edit(
        run, base=shutil.copytree(base, tmp_path / "moved").as_posix(), held_out={"more": {"test": "x.jsonl"}}
    )
    open_run(run)


def test_a_recipe_edited_by_hand_is_refused(run: RunFolder) -> None:
    edit(run, preprocess=[{"class_path": "trainmerge.Ties", "init_args": {"density": 0.1}}])
    with pytest.raises(ValueError, match=r"not of one run:\n.*recipe\.yaml differs.*\n.*preprocess"):
        tm.export_run(run.path, run.path.parent / "out")


def test_experts_in_another_order_are_refused(run: RunFolder) -> None:
    experts = yaml.safe_load(run.recipe.read_text())["recipe"]["experts"]
    edit(run, experts=dict(reversed(experts.items())))
    with pytest.raises(ValueError, match=r"recipe\.yaml has the experts"):
        tm.export_run(run.path, run.path.parent / "out")


@pytest.mark.parametrize("change", ["order", "layout"])
def test_coefficients_of_another_run_are_refused(run: RunFolder, change: str) -> None:
    own = tm.load_coefficients(run.coefficients)
    experts = tuple(reversed(own.experts)) if change == "order" else own.experts
    shapes = {name: torch.Size([4]) for name in own.layout.groups}
    layout = tm.Grouping("block").layout(shapes) if change == "layout" else own.layout
    save_coefficients(Coefficients(experts, layout), run.coefficients)
    with pytest.raises(ValueError, match=r"not of one run:\n  coefficients\.safetensors has"):
        tm.write_report(run.path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_coefficients_that_are_not_finite_are_refused(run: RunFolder, value: float) -> None:
    own = tm.load_coefficients(run.coefficients)
    save_coefficients(Coefficients(own.experts, own.layout, value), run.coefficients)
    with pytest.raises(ValueError, match=r"coefficients\.safetensors: .*not finite"):
        open_run(run)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "{}", '{"experts": ["mood"]}', pytest.param("[" * 100_000, id="deep")],
)
def test_a_damaged_manifest_is_named_with_a_remedy(run: RunFolder, content: str) -> None:
    run.manifest.write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json: .* Restore it from a copy"):
        open_run(run)


@pytest.mark.parametrize(("key", "kind"), [("experts", "list"), ("recipe", "mapping"), ("data", "mapping")])
def test_a_manifest_with_a_value_of_another_kind_is_named(run: RunFolder, key: str, kind: str) -> None:
    run.manifest.write_text(json.dumps(json.loads(run.manifest.read_text()) | {key: 5}))
    with pytest.raises(ValueError, match=rf"manifest\.json: {key} is 5, not a {kind}\. Restore it"):
        open_run(run)


def test_a_line_that_a_killed_run_left_half_written_is_passed_over(run: RunFolder) -> None:
    whole = run.metrics.read_text()
    run.metrics.write_text(whole + '{"step": 2, "lo')
    tm.write_report(run.path)
    lines = whole.splitlines()
    run.metrics.write_text("\n".join(["{", *lines]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 1 is not valid JSON"):
        tm.write_report(run.path)
    assert json.loads(lines[0])["step"] == 0


def test_keys_that_an_older_manifest_lacks_are_no_difference(run: RunFolder) -> None:
    made = run.read_manifest()
    del made["recipe"]["grouping"]["include"]
    run.manifest.write_text(json.dumps(made))
    open_run(run)


@pytest.mark.parametrize("content", ["{", "{}", "[]", pytest.param("[" * 100_000, id="deep")])
def test_damaged_sources_are_made_again(run: RunFolder, content: str) -> None:
    run.sources.write_text(content)
    assert list(open_run(run)[0].experts) == run.read_manifest()["experts"]
