"""Checkpoints with a head of their own, and held-out tasks with one: accuracies are transformers' own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification

import trainmerge as tm
from tests.evaluate.test_own_heads import LABELS, TEXTS, logits, run_of, with_test
from tests.heads_world import write_heads
from trainmerge.run.recipe import Recipe
from trainmerge.run.recipe_tasks import HeldOut

NAMES = {0: "low", 1: "mid", 2: "high"}
OTHERS = {**LABELS, "id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()}}


def accuracy(folder: Path, recipe: Recipe, told: list[int]) -> Any:
    """Of transformers' own class for single texts, up to the rounding of float32."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    says = logits(model, recipe, TEXTS).argmax(-1).tolist()
    return pytest.approx(sum(a == b for a, b in zip(says, told, strict=True)) / len(told), rel=1e-6)


@pytest.mark.parametrize("architecture", ["Roberta", "Llama"])
def test_a_task_is_scored_as_transformers_does(tmp_path: Path, architecture: str) -> None:
    recipe, models = write_heads(tmp_path, architecture, {"a": LABELS, "b": OTHERS})
    told = [i % 3 for i in range(len(TEXTS))]  # no model is right about all of them
    for name in models:
        rows = [
            {"text": text, "label": i if name == "a" else NAMES[i]}
            for text, i in zip(TEXTS, told, strict=True)
        ]
        recipe = with_test(recipe, name, rows, tmp_path)
    run = run_of(recipe, tmp_path / "run", steps=1)
    out = tm.export_run(run, tmp_path / "out", task="b")
    found = tm.evaluate_checkpoint(out, recipe, max_length=32)
    assert found.held_in == ("b",)
    assert found.scores[str(out)] == {"b": accuracy(out, recipe, told)}
    assert found.scores[str(out)] == {"b": tm.evaluate_run(run, grid=()).scores["learned"]["b"]}
    expert = tm.evaluate_checkpoint(tmp_path / "a", recipe, max_length=32)
    assert expert.scores[str(tmp_path / "a")] == {"a": accuracy(tmp_path / "a", recipe, told)}
    several = tm.compare([run, out, tmp_path / "b"], recipe=run).evaluation
    assert several.held_in == ("b",)
    assert several.scores[str(out)] == several.scores[str(run)] == found.scores[str(out)]
    assert several.scores[str(tmp_path / "b")] == {"b": accuracy(tmp_path / "b", recipe, told)}
    with pytest.raises(ValueError, match=r"no task in common: \S+out of b; \S+a of a$"):
        tm.compare([out, tmp_path / "a"], recipe=run)
    alone = replace(recipe, experts={"a": recipe.experts["a"]})
    with pytest.raises(ValueError, match=r"out is the export of the task 'b', and the recipe's experts"):
        tm.evaluate_checkpoint(out, alone)


def test_held_out_tasks_have_own_heads(tmp_path: Path) -> None:
    """The base under a checkpoint's head is that checkpoint where their backbones are the same."""
    recipe, models = write_heads(tmp_path, "Roberta", {"a": LABELS, "x": OTHERS})
    told = logits(models["a"], recipe, TEXTS).argmax(-1).tolist()
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, told, strict=True)]
    recipe = with_test(recipe, "a", rows, tmp_path)
    recipe = with_test(recipe, "x", [{**row, "label": NAMES[int(row["label"])]} for row in rows], tmp_path)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", config=models["x"].config)
    state = {n: p for n, p in models["x"].state_dict().items() if n.startswith("classifier.")}
    base.load_state_dict(state, strict=False)
    base.save_pretrained(tmp_path / "whole")
    held = HeldOut(str(recipe.experts["x"].test), path=recipe.experts["x"].path)
    recipe = replace(recipe, experts={"a": recipe.experts["a"]}, held_out={"x": held})
    run = run_of(recipe, tmp_path / "run")
    found = tm.evaluate_run(run, grid=())
    assert found.held_out == ("x",)
    want = accuracy(tmp_path / "whole", recipe, told)
    assert found.others["base"] == {"x": want}
    assert found.others["learned"].keys() == {"x"}
    out = tm.evaluate_checkpoint(tm.export_run(run, tmp_path / "out"), recipe, max_length=32)
    assert out.others[str(tmp_path / "out")] == found.others["learned"]
    task = tm.export_run(run, tmp_path / "task", task="a")
    with pytest.warns(
        UserWarning, match=r"task has a head of its own, so the held-out tasks \['x'\] are not"
    ):
        assert tm.evaluate_checkpoint(task, recipe, max_length=32).held_out == ()


def test_held_out_heads_that_are_none(tmp_path: Path) -> None:
    recipe, _ = write_heads(tmp_path, "Roberta", {"a": LABELS})
    test = str(recipe.experts["a"].calibration)
    with pytest.raises(ValueError, match="a task has a `head`, or a `path` to the files of its own head"):
        HeldOut(test, head="own")
    with pytest.raises(ValueError, match="a task has a `head`, or a `path`"):
        HeldOut(test, head=tm.LinearHead("h.safetensors"), path="x")
    none = replace(recipe, held_out={"x": HeldOut(test, path=recipe.base)})
    with pytest.raises(ValueError, match=r"held_out: the files of \['x'\] have no head of their own"):
        tm.evaluate_checkpoint(recipe.base, none)
