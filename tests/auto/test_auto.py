"""`trainmerge auto` on a tiny world: its table, its choice, its export, and that it resumes.

Legend: `K` experts, `G` coefficient groups.
"""

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import trainmerge as tm
from tests.world import LABELS, write_world
from trainmerge.auto import auto_config, choice, finished_search, preview_auto, search, starts
from trainmerge.auto.starts import Start
from trainmerge.auto.trials import Trial, TrialLog
from trainmerge.cli import main
from trainmerge.coefficients.coefficients import load_coefficients
from trainmerge.data.held_out import split
from trainmerge.fitting.held_out import HeldOutJudge
from trainmerge.run.folder import RunFolder
from trainmerge.run.in_use import in_use

K = len(LABELS)
pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:the best merge is further"),
    pytest.mark.filterwarnings("ignore:no merge is closer"),
]
FEW = [Start("task arithmetic", scales=(0.2, 0.4)), Start("TIES", (tm.Ties(),), scales=(0.5, 1.0))]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    config = {
        "recipe": {
            "base": str(root / "base"),
            "each": {
                "path": f"{root}/experts/{{name}}",
                "calibration": f"{root}/{{name}}/calibration.jsonl",
                "test": f"{root}/{{name}}/test.jsonl",
                "head": {
                    "class_path": "trainmerge.LabelHead",
                    "init_args": {"labels": f"{root}/{{name}}/labels.json"},
                },
            },
            "experts": [*LABELS],
        },
        "model": {
            "objective": {"class_path": "trainmerge.Alignment"},
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.02}},
        },
        "data": {"batch_size": 4, "max_length": 16},
        "trainer": {"max_steps": 4, "accelerator": "cpu", "enable_progress_bar": False},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    return root


@pytest.fixture(scope="module")
def chosen(world: Path) -> tm.Choice:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "starts", lambda *_: FEW)
        return tm.auto_config(world / "config.yaml", world / "merged")


def test_the_best_row_is_chosen_and_exported(world: Path, chosen: tm.Choice) -> None:
    assert chosen.best == max(chosen.rows, key=lambda name: chosen.rows[name].mean)
    assert {"task arithmetic", "TIES"} <= chosen.rows.keys()
    assert any(name.startswith("learned from") for name in chosen.rows)
    judged = TrialLog(world / "merged-auto" / "trials.jsonl").known.values()
    uniform = max(t.mean for t in judged if t.examples == "held out")
    assert chosen.rows[chosen.best].mean >= uniform
    again = tm.export_run(chosen.run, world / "again")
    one, other = load_file(again / "model.safetensors"), load_file(world / "merged" / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    written = json.loads((world / "merged-auto" / "auto.json").read_text())
    assert written["best"] == chosen.best
    assert written["rows"][chosen.best]["mean"] == chosen.rows[chosen.best].mean


def test_scales_per_expert_are_chosen_by_examples_that_the_fits_learn_from(
    world: Path, chosen: tm.Choice
) -> None:
    """What judges a row in the end has chosen no more than one number of it."""
    judged = TrialLog(world / "merged-auto" / "trials.jsonl").known.values()
    for name in (start.name for start in FEW):
        common = [t for t in judged if (t.start, t.examples) == (name, "held out") and len({*t.scales}) == 1]
        own = [t for t in judged if (t.start, t.examples) == (name, "learned from")]
        best = max(own, key=lambda trial: trial.mean)
        assert own[0].scales in [trial.scales for trial in common]  # where the search begins
        (same,) = [t for t in judged if (t.start, t.scales, t.examples) == (name, best.scales, "held out")]
        assert same.recovered != best.recovered
        assert chosen.rows[name] == max([*common, same], key=lambda trial: trial.mean)


def edit_labels(place: Path, _: dict[str, Any]) -> None:
    (place / "mood" / "labels.json").write_text(json.dumps(["good happy", "bad awful"]))


def edit_held_out(place: Path, _: dict[str, Any]) -> None:
    file = place / "mood" / "calibration.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    _, (held, *_) = split(range(len(lines)), 0.2, seed=0, expert=[*LABELS].index("mood"))
    lines[held] = json.dumps({"text": "red red"}) + "\n"
    file.write_text("".join(lines))


def edit_constraint(_: Path, config: dict[str, Any]) -> None:
    config["model"]["constraint"] = {"class_path": "trainmerge.Box", "init_args": {"high": 3.0}}


def edit_memory(_: Path, config: dict[str, Any]) -> None:
    config["model"]["quantise"] = {"class_path": "trainmerge.Int8"}


@pytest.mark.parametrize("edit", [edit_constraint, edit_held_out, edit_labels, edit_memory])
def test_a_merge_is_judged_again_once_anything_that_decides_its_share_changed(
    world: Path, tmp_path: Path, edit: Callable[[Path, dict[str, Any]], None]
) -> None:
    for name in LABELS:
        shutil.copytree(world / name, tmp_path / name)
    config = yaml.safe_load((world / "config.yaml").read_text())
    each = config["recipe"]["each"]
    each["calibration"] = f"{tmp_path}/{{name}}/calibration.jsonl"
    each["head"]["init_args"]["labels"] = f"{tmp_path}/{{name}}/labels.json"

    def judged() -> int:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        made = search.AutoSearch(tmp_path / "config.yaml", tmp_path / "auto", 0.2, None, None)
        made.judged["task arithmetic"]([2.0] * K)
        return len((tmp_path / "auto" / "trials.jsonl").read_text().splitlines())

    assert [judged(), judged()] == [1, 1]
    edit(tmp_path, config)
    assert judged() == 2


def start_of(row: str) -> str:
    return row.removeprefix("learned from ").partition(", ")[0]


def test_learning_begins_at_the_judged_scales(chosen: tm.Choice) -> None:
    """A learned row is judged before its first step, where it is the row of its start."""
    for name, run in chosen.learned.items():
        start = chosen.rows[start_of(name)]
        assert chosen.rows[name].mean >= start.mean - 1e-6
        given = load_coefficients(Path(yaml.safe_load(RunFolder(run).config.read_text())["model"]["initial"]))
        for k, scale in enumerate(start.scales):
            assert given().detach()[k].unique() == torch.tensor(scale)  # of starts whose coefficients are 1


def test_eight_coefficients_per_tensor_are_learned(chosen: tm.Choice) -> None:
    assert [*chosen.learned] == [
        f"learned from {start_of(name)}, 8 chunks per tensor" for name in chosen.learned
    ]
    assert {start_of(name) for name in chosen.learned} == {start.name for start in FEW}
    for run in map(RunFolder, chosen.learned.values()):
        saved = load_coefficients(run.coefficients)
        assert max(map(len, saved.layout.groups.values())) == 8
        start = load_coefficients(Path(yaml.safe_load(run.config.read_text())["model"]["initial"]))
        assert saved.layout.groups.keys() == start.layout.groups.keys()
        assert {len(groups) for groups in start.layout.groups.values()} == {1}


def test_more_steps_than_before_go_on(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "starts", lambda *_: FEW[:1])
    config = yaml.safe_load((world / "config.yaml").read_text())
    calls = itertools.count()  # every later merge is better
    monkeypatch.setattr(HeldOutJudge, "recovered", lambda _: torch.full((K,), next(calls) / 1000))
    logs = []
    for steps in (2, 4):
        config["trainer"]["max_steps"] = steps
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        found = tm.auto_config(tmp_path / "config.yaml", tmp_path / "merged", overwrite=True)
        (run,) = found.learned.values()
        logs.append((run / "metrics.jsonl").read_text().splitlines())
        assert json.loads(logs[-1][-1])["step"] == steps - 1
    assert logs[1][: len(logs[0])] == logs[0]


def test_a_damaged_choice_is_made_again(world: Path, chosen: tm.Choice, tmp_path: Path) -> None:
    place = tmp_path / "merged-auto"
    shutil.copytree(world / "merged-auto", place)
    (place / "auto.json").write_text("{}")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "model.safetensors").write_bytes(b"another merge")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        tm.auto_config(world / "config.yaml", tmp_path / "merged")
    (tmp_path / "merged" / "model.safetensors").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "starts", lambda *_: FEW)
        assert tm.auto_config(world / "config.yaml", tmp_path / "merged").best == chosen.best


def test_a_run_in_chunks_can_be_the_choice(world: Path, chosen: tm.Choice, tmp_path: Path) -> None:
    row = next(iter(chosen.learned))
    place = tmp_path / "merged-auto"
    shutil.copytree(world / "merged-auto", place)
    written = json.loads((place / "auto.json").read_text())
    written |= {"best": row, "run": chosen.learned[row].name}
    (place / "auto.json").write_text(json.dumps(written))
    recipe = preview_auto(world / "config.yaml").recipe
    found = finished_search(place, recipe)
    assert found is not None
    assert found.best == row
    grouping = replace(recipe.grouping, granularity="block")
    assert finished_search(place, replace(recipe, grouping=grouping)) is None
    assert load_file(tm.export_run(found.run, tmp_path / "merged") / "model.safetensors")


def test_other_groupings_stay(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "starts", lambda *_: FEW[:1])
    config = yaml.safe_load((world / "config.yaml").read_text())
    config["recipe"]["grouping"] = {"granularity": "task"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    found = tm.auto_config(tmp_path / "config.yaml", tmp_path / "merged")
    assert [*found.learned] == [f"learned from {FEW[0].name}"]


def test_the_same_call_resumes(world: Path, chosen: tm.Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "starts", lambda *_: FEW)
    log = (world / "merged-auto" / "trials.jsonl").read_bytes()
    before = RunFolder(chosen.run).coefficients.read_bytes()
    again = tm.auto_config(world / "config.yaml", world / "merged", overwrite=True)
    assert (world / "merged-auto" / "trials.jsonl").read_bytes() == log  # nothing was judged again
    assert RunFolder(again.run).coefficients.read_bytes() == before
    assert again.best == chosen.best
    made = (world / "merged" / "model.safetensors").stat().st_mtime_ns
    tm.auto_config(world / "config.yaml", world / "merged")  # it is there: nothing is written again
    assert (world / "merged" / "model.safetensors").stat().st_mtime_ns == made
    assert {n: t.recovered for n, t in again.rows.items()} == {n: t.recovered for n, t in chosen.rows.items()}


def test_without_learning_the_best_start_is_exported(
    world: Path, chosen: tm.Choice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "starts", lambda *_: FEW)
    config = str(world / "config.yaml")
    assert main(["auto", config, str(tmp_path / "out"), "--learn", "false"]) == 0
    found = choice.Choice.read(tmp_path / "out-auto")
    assert found.rows == {n: replace(found.rows[n], recovered=chosen.rows[n].recovered) for n in found.rows}
    assert {*found.rows} == {start.name for start in FEW}
    assert load_file(tmp_path / "out" / "model.safetensors")
    more = tm.auto_config(config, tmp_path / "out", overwrite=True)  # goes on to learn
    assert {*more.rows} == {*chosen.rows}


@pytest.mark.parametrize(("limit", "learned", "judged"), [(10, 10, 8), (30, 30, 8), (1000, 32, 8)])
def test_fits_learn_from_as_many_texts_as_without_auto_where_there_are_more(
    world: Path, tmp_path: Path, limit: int, learned: int, judged: int
) -> None:
    config = yaml.safe_load((world / "config.yaml").read_text())
    config["data"]["max_examples"] = limit
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    data = search.AutoSearch(tmp_path / "config.yaml", tmp_path / "auto", 0.2, None, None).settings.data
    assert [len(own) for own in data.examples] == [learned] * K
    assert [len(own) for own in data.held_out_part().examples] == [judged] * K


def test_a_constraint_that_excludes_a_methods_own_coefficients_projects_them(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = yaml.safe_load((world / "config.yaml").read_text())
    config["model"] |= {
        "constraint": {"class_path": "trainmerge.Box", "init_args": {"high": 0.5}}, "initial": 0.3
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(search, "starts", lambda *_: [Start("TIES", (tm.Ties(),), scales=(0.4, 1.0))])
    made = search.AutoSearch(tmp_path / "config.yaml", tmp_path / "auto", 0.2, None, None)
    ties = made.judged["TIES"]
    at = [float(ties.at([scale] * K).unique()) for scale in (0.4, 1.0)]
    assert at == [pytest.approx(0.4), 0.5]
    chosen = made.choose(learn=False)
    assert tm.load_coefficients(chosen.run / "coefficients.safetensors")().max() <= 0.5


def test_a_preview_says_what_is_tried_and_at_most_how_often(
    world: Path, chosen: tm.Choice, monkeypatch: pytest.MonkeyPatch
) -> None:
    del chosen
    monkeypatch.setattr(search, "starts", lambda *_: FEW)
    seen = preview_auto(world / "config.yaml")
    judged = (world / "merged-auto" / "trials.jsonl").read_text().splitlines()
    assert [start.name for start in seen.tried] == [start.name for start in FEW]
    assert len(judged) <= seen.merges == 2 * (2 + 4) + 2 * (2 * K + 2)
    assert (seen.judge, seen.objective, seen.steps, seen.examples) == ("TotalVariation", "Alignment", 4, 24)
    assert seen.judging_seconds(3.0, 0.5) == seen.merges * (1.0 * 24 / 4 + 0.5)


def test_a_preview_gives_the_reason_that_the_search_gives(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slerp = Start("SLERP", (tm.Slerp(),), scales=(1.0,))
    monkeypatch.setattr(search, "starts", lambda *_: [FEW[0], slerp])
    seen = preview_auto(world / "config.yaml")
    assert [start.name for start in seen.tried] == ["task arithmetic"]
    judged = search.AutoSearch(world / "config.yaml", tmp_path, 0.2, None, None).judged["SLERP"]
    with pytest.raises(ValueError, match="Slerp") as refused:
        judged([1.0] * K)
    assert seen.left_out == {"SLERP": str(refused.value)}


def test_a_finished_search_is_known_by_its_recipe(
    world: Path, chosen: tm.Choice, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = preview_auto(world / "config.yaml")
    found = finished_search(world / "merged-auto", seen.recipe)
    assert found is not None
    assert (found.best, found.run) == (chosen.best, chosen.run)
    assert {n: t.recovered for n, t in found.rows.items()} == {n: t.recovered for n, t in chosen.rows.items()}
    fewer = dict(list(seen.recipe.experts.items())[1:])
    assert finished_search(world / "merged-auto", replace(seen.recipe, experts=fewer)) is None
    assert finished_search(tmp_path, seen.recipe) is None
    (tmp_path / "auto.json").write_text('{"best": "a", "run": "b", "rows": {}}')
    with pytest.raises(ValueError, match=r"auto\.json: has no rows, or none that is the best\. Run"):
        finished_search(tmp_path, seen.recipe)
    words = ["inspect", str(world / "config.yaml"), "--weights", "no", "--out", str(world / "merged")]
    assert main([*words, "--suggest", str(tmp_path / "made.yaml")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"trainmerge auto chose {chosen.best} (scale " in said
    assert f"its run is {chosen.run}" in said


def test_every_start_can_be_judged(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command line; one scale each, and no time to learn."""

    def single(*given: object) -> list[Start]:
        made: Sequence[Start] = starts.starts(*given)
        return [Start(s.name, s.preprocess, s.initial, (0.5,)) for s in made]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "starts", single)
        patch.setattr(search, "FINALISTS", 0)
        assert main(["auto", str(world / "config.yaml"), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for start in starts.starts(K, (), 0.3):
        assert start.name in printed
    assert "(chosen)" in printed
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_the_base_is_judged_once(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All starts share its losses; the tasks' weights are in the mean."""
    content, counted = yaml.safe_load((world / "config.yaml").read_text()), []
    content["recipe"]["experts"] = {n: {"weight": float(k)} for k, n in enumerate(LABELS)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    measure = HeldOutJudge.base_losses.func
    known = cached_property(lambda own: counted.append(own) or measure(own))
    known.__set_name__(HeldOutJudge, "base_losses")
    monkeypatch.setattr(HeldOutJudge, "base_losses", known)
    monkeypatch.setattr(search, "starts", lambda *_: FEW)
    judged = search.AutoSearch(tmp_path / "config.yaml", tmp_path, 0.2, None, None).judged
    trials = [judge([0.3] * K) for judge in judged.values()]
    assert len(counted) == 1
    for trial in trials:
        assert trial.mean == pytest.approx((trial.recovered[1] + 2 * trial.recovered[2]) / 3)


def test_a_start_that_cannot_be_made_is_left_out(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slerp = Start("SLERP", (tm.Slerp(),), scales=(1.0,))  # takes two experts, and there are three
    monkeypatch.setattr(search, "starts", lambda *_: [FEW[0], slerp])
    monkeypatch.setattr(search, "FINALISTS", 0)
    with pytest.warns(UserWarning, match="SLERP is left out"):
        found = tm.auto_config(world / "config.yaml", tmp_path / "out")
    assert [*found.rows] == ["task arithmetic"]


def test_without_time_only_the_first_start_is_judged(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no start was judged"):
        tm.auto_config(world / "config.yaml", tmp_path / "out", minutes=1e-9)


def test_if_every_start_fails_the_reason_is_in_the_error(world: Path, tmp_path: Path) -> None:
    content = yaml.safe_load((world / "config.yaml").read_text())
    content["recipe"]["each"]["head"]["init_args"]["labels"] = str(tmp_path)
    (tmp_path / "labels.yaml").write_text(yaml.safe_dump(content))
    with (
        pytest.warns(UserWarning, match="is left out"),
        pytest.raises(ValueError, match=rf"^no start was judged: .*{tmp_path}: not a file"),
    ):
        auto_config(tmp_path / "labels.yaml", tmp_path / "out")


def test_it_is_loud_where_nothing_helps() -> None:
    with pytest.warns(UserWarning, match="no merge is closer"):
        choice.warn_if_none(Trial("s", (0.1,), (-0.1, 0.05)))
    with pytest.warns(UserWarning, match="further from one of its experts"):
        choice.warn_if_none(Trial("s", (0.1,), (-0.1, 0.5)))


def test_a_search_in_a_folder_in_use_changes_nothing(world: Path, tmp_path: Path) -> None:
    (tmp_path / "auto").mkdir()
    log = tmp_path / "auto" / "trials.jsonl"
    log.write_text("half a line that another process is writing")
    with in_use(RunFolder(tmp_path / "auto"), "trainmerge auto"), pytest.raises(ValueError, match="auto"):
        auto_config(world / "config.yaml", tmp_path / "out", tmp_path / "auto")
    assert log.read_text() == "half a line that another process is writing"
    assert [path.name for path in (tmp_path / "auto").iterdir() if path.name != ".lock"] == [log.name]


def test_a_folder_that_is_there_is_refused_before_the_search(
    world: Path, chosen: tm.Choice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"another merge")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        auto_config(world / "config.yaml", tmp_path / "out")
    assert not (tmp_path / "out-auto").exists()
    monkeypatch.setattr(search.AutoSearch, "choose", lambda *_: pytest.fail("searched"))
    with pytest.raises(FileExistsError, match="not an empty folder"):  # also by a search that has ended
        auto_config(world / "config.yaml", tmp_path / "out", chosen.run.parent)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="not an empty folder"):  # no folder to replace
        auto_config(world / "config.yaml", tmp_path / "file", overwrite=True)
    for inside in (tmp_path / "new", tmp_path / "new" / "auto"):
        with pytest.raises(ValueError, match="or inside it; choose another"):
            auto_config(world / "config.yaml", tmp_path / "new", inside)


def test_what_it_cannot_do_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="held_out"):
        auto_config(world / "config.yaml", tmp_path / "out", held_out=0.0)
    content = yaml.safe_load((world / "config.yaml").read_text())
    content["model"]["constraint"] = {"class_path": "trainmerge.Sigmoid"}
    (tmp_path / "sigmoid.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"use trainmerge\.Box"):
        auto_config(tmp_path / "sigmoid.yaml", tmp_path / "out")
