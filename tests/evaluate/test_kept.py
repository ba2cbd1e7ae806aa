"""Scores of earlier evaluations: taken without a forward, to the bit, and never of other inputs."""

import json
import multiprocessing as mp
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

import trainmerge as tm
from tests.world import languages_recipe, recipe, write_languages, write_world
from trainmerge.cli import main
from trainmerge.evaluate import score_keys
from trainmerge.evaluate.evaluation import Evaluation
from trainmerge.evaluate.kept import KeptScores, scores_beside
from trainmerge.run.recipe import Recipe
from trainmerge.run.recipe_files import calibration_files

GRID = (0.3, 0.5, 0.8)
LENGTH = 16


@contextmanager
def forwards() -> Iterator[list[str]]:
    """The classes of the models whose forward ran, one entry per call."""
    seen: list[str] = []

    def note(module: nn.Module, *_: Any) -> None:
        if isinstance(module, PreTrainedModel):
            seen.append(type(module).__name__)

    hook = nn.modules.module.register_module_forward_hook(note)
    try:
        yield seen
    finally:
        hook.remove()


def fit(merge: Recipe, run: Path, initial: float = 0.6) -> Path:
    module = tm.MergeModule(merge, initial=initial, workspace=str(run / "workspace"))
    data = tm.Calibration(calibration_files(merge), merge.base, batch_size=4, max_length=LENGTH)
    tm.fit(module, data, tm.make_trainer(run, max_steps=0), run)
    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Language models, whose scoring is all forwards: two runs of one recipe, and an export."""
    root = write_languages(tmp_path_factory.mktemp("made"))
    for name, initial in (("one", 0.6), ("two", 0.9)):
        fit(languages_recipe(root), root / "runs" / name, initial)
    tm.export_run(root / "runs" / "one", root / "merged")
    return root


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    """A copy without kept scores; its recipes name the copy's files."""
    root = Path(shutil.copytree(made, tmp_path / "world"))
    for file in [*root.glob("runs/*/recipe.yaml"), *root.glob("runs/*/manifest.json")]:
        file.write_text(file.read_text().replace(str(made), str(root)))
    for name in ("one", "two"):
        (root / "runs" / name / "sources.json").unlink()
    return root


def evaluate(run: Path, **options: Any) -> tuple[Evaluation, int]:
    """An evaluation, and how many forwards it took."""
    with forwards() as seen:
        found = tm.evaluate_run(run, **{"grid": GRID, **options})
    return found, len(seen)


def content(found: Evaluation) -> str:
    """All that is printed and written, and the outcomes that the bootstrap reads."""
    outcomes = {row: {t: s.outcomes.tolist() for t, s in own.items()} for row, own in found.rows.items()}
    return json.dumps([found.to_json(), outcomes])


def test_the_same_evaluation_again_reads_no_text_and_gives_the_same_bits(world: Path) -> None:
    first, cost = evaluate(world / "runs/one")
    again, none = evaluate(world / "runs/one")
    assert cost > 0
    assert none == 0
    assert content(again) == content(first)
    assert first.taken == ()
    assert set(again.taken) == set(first.rows)
    anew, same_cost = evaluate(world / "runs/one", reuse=False)
    assert (content(anew), same_cost, anew.taken) == (content(first), cost, ())


def test_another_run_of_the_recipe_scores_its_learned_row_alone(world: Path) -> None:
    evaluate(world / "runs/one")
    alone, cost = evaluate(world / "runs/two", compare=False, reuse=False)
    found, forwards_of_it = evaluate(world / "runs/two")
    assert forwards_of_it == cost
    assert set(found.taken) == set(found.rows) - {"learned"}
    assert found.scores["learned"] == alone.scores["learned"]
    assert content(found) == content(evaluate(world / "runs/two", reuse=False)[0])


def test_a_race_is_not_run_again(tmp_path: Path) -> None:
    write_world(tmp_path)
    merge = recipe(tmp_path)
    one, two = (fit(merge, tmp_path / "runs" / name, c) for name, c in (("one", 0.6), ("two", 1.4)))
    label_heads = evaluate(one, compare=False)[1]  # embedding label texts, and the learned row
    first, _ = evaluate(one)
    again, cost = evaluate(one)
    assert content(again) == content(first)
    alone = evaluate(two, compare=False, reuse=False)[1]
    found, forwards_of_it = evaluate(two)
    anew, _ = evaluate(two, reuse=False)
    assert forwards_of_it == alone == label_heads
    assert cost < label_heads  # the label texts only
    assert found.scores == anew.scores
    best = next(row for row in found.rows if row.startswith("task arithmetic"))
    without = [c for c in GRID if best != f"task arithmetic {c}"]  # another best: the losers race again
    assert evaluate(two, grid=without)[0].scores == evaluate(two, grid=without, reuse=False)[0].scores


def test_an_evaluation_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """A race reads the examples first that earlier merges missed: also merges that are known."""
    write_world(tmp_path)
    run = fit(recipe(tmp_path), tmp_path / "run", 2.0)  # 1.5 wins first, and the others leave one by one
    grid = (0.2, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5)
    whole, _ = evaluate(run, grid=grid)
    files = sorted(tmp_path.glob(".scores/*.json"), key=lambda file: file.stat().st_mtime_ns)
    entries = {file.name: file.read_bytes() for file in files}
    for kept in range(len(files) - 7, len(files)):  # within the race
        for file in files[kept:]:
            file.unlink()
        found, _ = evaluate(run, grid=grid)
        assert content(found) == content(whole)
        assert {file.name: file.read_bytes() for file in tmp_path.glob(".scores/*.json")} == entries


def test_a_checkpoint_and_a_comparison(world: Path) -> None:
    runs, merged = world / "runs", str(world / "merged")
    tasks = languages_recipe(world)
    with forwards() as seen:
        first = tm.evaluate_checkpoint(merged, tasks, max_length=LENGTH, kept=scores_beside(runs / "one"))
        cost = len(seen)
        again = tm.evaluate_checkpoint(merged, tasks, max_length=LENGTH, kept=scores_beside(runs / "one"))
    assert len(seen) == cost > 0
    assert (content(again), again.taken) == (content(first), (merged,))
    evaluate(runs / "one")
    evaluate(runs / "two")
    with forwards() as seen:
        found = tm.compare([runs / "one", runs / "two", merged])
    assert seen == []  # all three are known, by `evaluate` too
    assert found.evaluation.taken == tuple(found.evaluation.rows)
    anew = tm.compare([runs / "one", runs / "two", merged], reuse=False)
    assert content(found.evaluation) == content(anew.evaluation)
    assert found.differences == anew.differences


def change_text(root: Path) -> dict[str, Any]:
    file = root / "a-test.jsonl"
    file.write_text(file.read_text().replace("red", "blue", 1))
    return {}


def change_tokenizer(root: Path) -> dict[str, Any]:
    file = root / "base" / "tokenizer.json"
    file.write_text(file.read_text().replace('"red"', '"swap"').replace('"fish"', '"red"'))
    return {}


def change_length(_: Path) -> dict[str, Any]:
    return {"max_length": 4}


def change_answers(root: Path) -> dict[str, Any]:
    for name in "ab":
        file = root / f"{name}-test.jsonl"
        rows = [json.loads(line) | {"prompt": "red blue"} for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"answers": 3}


def change_coefficients(root: Path) -> dict[str, Any]:
    fit(languages_recipe(root), root / "runs/three", 0.60001)
    shutil.rmtree(root / "runs/one")
    (root / "runs/three").rename(root / "runs/one")
    return {}


@pytest.mark.parametrize(
    ("change", "stays"),
    [
        (change_answers, set()),
        (change_coefficients, {"average", "base", "expert", "task arithmetic"}),
        (change_length, set()),
        (change_text, set()),
        (change_tokenizer, set()),
    ],
)
def test_a_changed_input_is_scored_anew(
    world: Path, change: Callable[[Path], dict[str, Any]], stays: set[str]
) -> None:
    run = world / "runs/one"
    evaluate(run)
    options = change(world)
    found, cost = evaluate(run, **options)
    assert cost > 0
    assert {" ".join(word for word in row.split() if not word[0].isdigit()) for row in found.taken} == stays
    assert content(found) == content(evaluate(run, reuse=False, **options)[0])


def test_one_bit_of_an_experts_weights_is_another_expert(world: Path) -> None:
    evaluate(world / "runs/one")
    file = world / "b" / "model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name].view(torch.int32).view(-1)[0] ^= 1
    save_file(tensors, file, {"format": "pt"})
    fit(languages_recipe(world), world / "runs/again", 0.6)
    found, cost = evaluate(world / "runs/again")
    assert (found.taken, cost > 0) == ((), True)


def test_precision_limit_labels_and_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_world(tmp_path)
    run = fit(recipe(tmp_path), tmp_path / "run")
    plain = ["evaluate", str(run), "--no-compare", "--output", str(tmp_path / "all.json")]

    def taken(*more: str) -> bool:
        assert main([*plain, *more]) == 0
        return (
            "1 of 1 rows are from earlier evaluations (learned): --fresh scores them"
            in capsys.readouterr().out
        )

    assert not taken()
    assert taken()
    assert not taken("--fresh")
    for other in (["--limit", "7"], ["--precision", "bf16"], ["--max_length", "3"]):
        assert not taken(*other), other
        assert taken(*other), other
    test = tmp_path / "mood" / "test.jsonl"
    test.write_text(test.read_text().replace('"label": 1', '"label": 0', 1))
    assert not taken()
    labels = tmp_path / "mood" / "labels.json"
    labels.write_text(json.dumps(["good happy", "bad awful"]))
    assert not taken()
    assert taken()


def test_written_scores_are_the_same_files(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = world / "runs/one", []
    for _ in range(2):
        assert main(["evaluate", str(run)]) == 0
        files = [(run / name).read_bytes() for name in ("scores.json", "evaluation.json")]
        table, _, rest = capsys.readouterr().out.partition("rows are from earlier evaluations")
        out.append((files, table.rstrip("0123456789of \n"), bool(rest)))
    assert out[0][:2] == out[1][:2]
    assert [line for *_, line in out] == [False, True]


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "other"])
def test_damaged_entries_are_ignored_and_written_again(world: Path, damage: str) -> None:
    run, folder = world / "runs/one", world / "runs/.scores"
    first, cost = evaluate(run)
    files = sorted(folder.glob("*.json"))
    whole = [file.read_bytes() for file in files]
    for file, other in zip(files, [*whole[1:], whole[0]], strict=True):
        text = file.read_bytes()
        file.write_bytes(
            {
                "cut": text[:-3],
                "flipped": text[:-2] + bytes([text[-2] ^ 1]) + text[-1:],
                "foreign": b"\x00\xff{",
                "other": other,  # a whole entry under another's name
            }[damage]
        )
    again, same_cost = evaluate(run)
    assert (content(again), same_cost, again.taken) == (content(first), cost, ())
    assert [file.read_bytes() for file in files] == whole


def test_a_folder_that_cannot_be_made_fails_nothing(world: Path) -> None:
    (world / "runs/.scores").write_text("a file in its place")
    first, cost = evaluate(world / "runs/one")
    again, same_cost = evaluate(world / "runs/one")
    assert (content(again), same_cost) == (content(first), cost)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place_fails_nothing(world: Path) -> None:
    (world / "runs").chmod(0o555)
    try:
        assert evaluate(world / "runs/one")[1] == evaluate(world / "runs/one")[1] > 0
    finally:
        (world / "runs").chmod(0o755)


def test_nothing_is_kept_of_files_that_changed_meanwhile(world: Path) -> None:
    kept = KeptScores(world / "scores", {"a": "task"})
    kept.checksums(world / "a")
    os.utime(world / "a" / "config.json", (1, 1))
    kept.put("key", 1.0)
    assert KeptScores(world / "scores").get("key") is None
    kept = KeptScores(world / "scores")
    kept.put("key", 1.0)
    assert KeptScores(world / "scores").get("key") == 1.0


def _score(run: str, out: str) -> None:
    torch.set_num_threads(1)
    Path(out).write_text(content(tm.evaluate_run(run, grid=GRID)))


def test_two_evaluations_at_once(world: Path) -> None:
    context = mp.get_context("spawn")
    outs = [world / f"{i}.json" for i in range(2)]
    processes = [context.Process(target=_score, args=(str(world / "runs/one"), str(out))) for out in outs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    found, cost = evaluate(world / "runs/one")
    assert cost == 0
    assert [out.read_text() for out in outs] == [content(found)] * 2
    assert not [file for file in (world / "runs/.scores").iterdir() if ".new-" in file.name]


class Mine(tm.LabelHead):
    """Somebody else's head, whose source may change."""


class Swapped(tm.Neurons):
    """Somebody else's alignment."""


def test_scores_under_foreign_code_are_not_kept(tmp_path: Path) -> None:
    write_world(tmp_path)
    merge = recipe(tmp_path)
    head = Mine(str(tmp_path / "mood" / "labels.json"))
    experts = {**merge.experts, "mood": replace(merge.experts["mood"], head=head)}
    for _ in range(2):
        found = tm.evaluate_checkpoint(merge.base, replace(merge, experts=experts), kept=tmp_path / "kept")
        assert found.taken == ()
    run = fit(replace(merge, align=(Swapped(),)), tmp_path / "run")
    for _ in range(2):
        assert evaluate(run)[0].taken == ()


def test_packages_that_may_be_absent_are_a_part_of_the_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision-9.8.dist-info").mkdir()
    (tmp_path / "torchvision-9.8.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 9.8\n")
    monkeypatch.syspath_prepend(tmp_path)
    score_keys._versions.cache_clear()
    assert score_keys._versions()["torchvision"] == ["9.8"]
    score_keys._versions.cache_clear()


def test_a_models_head_is_a_part_of_its_tasks_digest(tmp_path: Path) -> None:
    write_world(tmp_path)
    merge = recipe(tmp_path)
    first = tm.evaluate_checkpoint(merge.base, merge, kept=tmp_path / "kept")
    first_token = tm.LabelHead(str(tmp_path / "mood" / "labels.json"), pooling="first")
    experts = {**merge.experts, "mood": replace(merge.experts["mood"], head=first_token)}
    other = tm.evaluate_checkpoint(merge.base, replace(merge, experts=experts), kept=tmp_path / "kept")
    assert (first.taken, other.taken) == ((), ())
    assert tm.evaluate_checkpoint(merge.base, merge, kept=tmp_path / "kept").taken == (merge.base,)
