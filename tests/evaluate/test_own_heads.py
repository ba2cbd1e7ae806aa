"""Scores under experts' own heads: transformers' own predictions are right, whatever the class of the head.

Legend: `B` examples, `T` tokens.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import trainmerge as tm
from tests.heads_world import ARCHITECTURES, texts, write_heads, write_rows
from trainmerge.data.columns import Columns
from trainmerge.data.examples import Example
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.run.recipe import Recipe
from trainmerge.run.recipe_files import calibration_files

LABELS = {"task": "ForSequenceClassification", "num_labels": 3}
TEXTS = texts(9, 12)


@torch.no_grad()
def logits(model: PreTrainedModel, recipe: Recipe, rows: list[str], pairs: list[str] | None = None) -> Tensor:
    """What transformers computes for single texts, [B, V]."""
    tokenize = Tokenizer(recipe.base, 32)
    found = []
    for i, text in enumerate(rows):
        inputs = tokenize.encode([Example(text, pair=pairs[i] if pairs else None)]).inputs
        inputs.pop("labels", None)
        found.append(model(**inputs).logits[0])
    return torch.stack(found)


def centred(model: PreTrainedModel, recipe: Recipe, folder: Path) -> list[int]:
    """The expert's own predictions, of several classes: its last matrix is moved until they are balanced."""
    found = logits(model, recipe, TEXTS)
    told = (found - found.mean(0)).argmax(-1).tolist()
    last = next(p for n, p in reversed(list(model.named_parameters())) if n.endswith("bias") and len(p) == 3)
    with torch.no_grad():
        last.sub_(found.mean(0))
    model.save_pretrained(folder)
    assert logits(model, recipe, TEXTS).argmax(-1).tolist() == told
    return told


def run_of(recipe: Recipe, place: Path, columns: Columns = Columns(), steps: int = 0) -> Path:  # noqa: B008
    """A run folder of the recipe."""
    module = tm.MergeModule(recipe, tm.Alignment(), initial=0.5, workspace=str(place / "workspace"))
    data = tm.Calibration(
        calibration_files(recipe), recipe.base, batch_size=4, max_length=32, columns=columns
    )
    trainer = tm.make_trainer(place, max_steps=steps, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, data, trainer, place)
    return place


def with_test(recipe: Recipe, name: str, rows: list[dict[str, Any]], root: Path) -> Recipe:
    file = write_rows(root / f"{name}-test.jsonl", rows)
    return replace(recipe, experts=recipe.experts | {name: replace(recipe.experts[name], test=file)})


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a not in ("Llama", "Qwen2", "GPT2")])
def test_experts_are_right_about_themselves(tmp_path: Path, architecture: str) -> None:
    recipe, models = write_heads(tmp_path, architecture, {"a": LABELS})
    told = centred(models["a"], recipe, tmp_path / "a")
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, told, strict=True)]
    recipe = with_test(recipe, "a", rows, tmp_path)
    assert len(set(told)) > 1
    found = tm.evaluate_run(run_of(recipe, tmp_path / "run"), grid=())
    assert found.metric.name == "accuracy"
    assert found.scores["expert"] == {"a": 1.0}
    assert found.scores["base"]["a"] < 1.0


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "GPT2"])
def test_last_token_classifiers(tmp_path: Path, architecture: str) -> None:
    """They have no bias to balance, so the labels are the expert's own, and text names of its classes."""
    names = {0: "low", 1: "middle", 2: "high"}
    settings = {**LABELS, "id2label": names, "label2id": {v: k for k, v in names.items()}}
    recipe, models = write_heads(tmp_path, architecture, {"a": settings})
    told = logits(models["a"], recipe, TEXTS).argmax(-1).tolist()
    rows = [{"text": text, "label": names[i]} for text, i in zip(TEXTS, told, strict=True)]
    recipe = with_test(recipe, "a", rows, tmp_path)
    run = run_of(recipe, tmp_path / "run")
    assert tm.evaluate_run(run, grid=()).scores["expert"] == {"a": 1.0}
    rows[3]["label"] = "lowest"
    bad = with_test(recipe, "a", rows, tmp_path)
    with pytest.raises(
        ValueError, match=r"a-test\.jsonl: example 3: label is 'lowest', not a class number.*'high'"
    ):
        tm.evaluate_checkpoint(recipe.base, bad)


def test_token_labels(tmp_path: Path) -> None:
    """One label per word; words beyond the text's end, and those of -100, do not count."""
    settings = {"task": "ForTokenClassification", "num_labels": 3}
    recipe, models = write_heads(tmp_path, "Bert", {"a": settings})
    rows = []
    for i, text in enumerate(TEXTS):
        with torch.no_grad():
            says = models["a"](**Tokenizer(recipe.base, 32)([text])).logits[0].argmax(-1).tolist()
        rows.append({"text": text, "labels": says[1:-1]})  # without [CLS] and [SEP]
        rows[-1]["labels"][0] = -100 if i % 2 else says[1]
    run = run_of(with_test(recipe, "a", rows, tmp_path), tmp_path / "run")
    found = tm.evaluate_run(run, grid=())
    assert found.rows["expert"]["a"].measures == {"accuracy": 1.0, "macro_f1": 1.0}
    counted = sum(label != -100 for row in rows for label in row["labels"])
    assert found.rows["expert"]["a"].outcomes.sum(0).tolist() == [counted, counted]
    rows[2]["labels"] = rows[2]["labels"][:-1]
    with pytest.raises(ValueError, match=r"example 2: labels is \[.*give each word of the text one label"):
        tm.evaluate_checkpoint(recipe.base, with_test(recipe, "a", rows, tmp_path))


def test_answers_to_questions(tmp_path: Path) -> None:
    """The expert's best span inside the context, of transformers' own logits, is right."""
    recipe, models = write_heads(tmp_path, "Bert", {"a": {"task": "ForQuestionAnswering"}})
    questions, contexts = texts(3, 6), texts(4, 6)
    tokenize, rows = Tokenizer(recipe.base, 32), []
    for question, context in zip(questions, contexts, strict=True):
        with torch.no_grad():
            output = models["a"](**tokenize.encode([Example(question, pair=context)]).inputs)
        first = len(question.split()) + 2  # [CLS] question [SEP]
        words = context.split()
        spans = {
            (begin, end): float(output.start_logits[0, first + begin] + output.end_logits[0, first + end])
            for begin in range(len(words))
            for end in range(begin, len(words))
        }
        begin, end = max(spans, key=spans.__getitem__)
        rows.append(
            {"text": question, "context": context, "answers": {"text": [" ".join(words[begin : end + 1])]}}
        )
    calibration = write_rows(tmp_path / "a.jsonl", rows)
    recipe = with_test(recipe, "a", rows, tmp_path)
    recipe = replace(recipe, experts={"a": replace(recipe.experts["a"], calibration=calibration)})
    run = run_of(recipe, tmp_path / "run", Columns(pair="context"), steps=2)
    found = tm.evaluate_run(run, grid=())
    assert found.metric.name == "exact_match"
    assert found.rows["expert"]["a"].measures == {"exact_match": 1.0, "f1": 1.0}
    assert json.loads((run / "manifest.json").read_text())["data"]["columns"]["pair"] == "context"


def test_numbers_of_pairs(tmp_path: Path) -> None:
    """A cross-encoder: one number per pair of texts, and its correlations."""
    recipe, models = write_heads(
        tmp_path, "Roberta", {"a": {"task": "ForSequenceClassification", "num_labels": 1}}
    )
    others = texts(4, len(TEXTS))
    told = logits(models["a"], recipe, TEXTS, others)[:, 0]
    rows = [
        {"text": text, "other": other, "label": float(value)}
        for text, other, value in zip(TEXTS, others, told, strict=True)
    ]
    write_rows(tmp_path / "a.jsonl", [{"text": o, "other": t} for t, o in zip(TEXTS, others, strict=True)])
    run = run_of(with_test(recipe, "a", rows, tmp_path), tmp_path / "run", Columns(pair="other"), steps=2)
    found = tm.evaluate_run(run, grid=())
    assert found.metric.name == "pearson"
    measures = found.rows["expert"]["a"].measures
    assert measures["pearson"] == pytest.approx(1.0, abs=1e-6)
    assert measures["spearman"] == pytest.approx(1.0, abs=1e-12)
    assert measures["mse"] < 1e-10
    base = found.rows["base"]["a"]
    assert base.measures["pearson"] == pytest.approx(float(base.outcomes[:, 0].mean()))
    assert base.measures["pearson"] < 0.999


def test_independent_labels_and_several_kinds(tmp_path: Path) -> None:
    """Labels that hold, by name; and a recipe whose tasks have several measures."""
    names = {0: "loud", 1: "long", 2: "late"}
    several = {"problem_type": "multi_label_classification", "id2label": names, "num_labels": 3}
    recipe, models = write_heads(
        tmp_path, "Bert",
        {"a": {"task": "ForSequenceClassification", **several}, "b": {"task": "ForTokenClassification"}},
    )  # fmt: skip
    yes = logits(models["a"], recipe, TEXTS) > 0
    rows = [
        {"text": text, "labels": [names[i] for i in range(3) if own[i]]}
        for text, own in zip(TEXTS, yes.tolist(), strict=True)
    ]
    assert 0 < yes.double().mean() < 1
    recipe = with_test(recipe, "a", rows, tmp_path)
    recipe = with_test(recipe, "b", [{"text": t, "labels": [0] * len(t.split())} for t in TEXTS], tmp_path)
    found = tm.evaluate_run(run_of(recipe, tmp_path / "run", steps=2), grid=())
    assert found.metric.name == "score"
    assert found.rows["expert"]["a"].measures == {"f1": 1.0, "exact_match": 1.0}


def test_labels_as_others_write_them(tmp_path: Path) -> None:
    """Names in another order than the numbers, numbers as texts, and one number per independent label."""
    names = {0: "neg", 1: "neu", 2: "pos"}
    settings = {**LABELS, "id2label": names, "label2id": {"pos": 2, "neu": 1, "neg": 0}}
    several = {**LABELS, "problem_type": "multi_label_classification"}
    recipe, models = write_heads(tmp_path, "Bert", {"a": settings, "b": several})
    told = logits(models["a"], recipe, TEXTS).argmax(-1).tolist()
    each = [names[i] if k % 2 else str(i) for k, i in enumerate(told)]
    yes = (logits(models["b"], recipe, TEXTS) > 0).double().tolist()
    assert {0.0, 1.0} == {one for row in yes for one in row}
    for name, column, values in (("a", "label", each), ("b", "labels", yes)):
        rows = [{"text": text, column: value} for text, value in zip(TEXTS, values, strict=True)]
        recipe = with_test(recipe, name, rows, tmp_path)
    found = tm.evaluate_run(run := run_of(recipe, tmp_path / "run"), grid=())
    assert found.rows["expert"]["a"].measures["accuracy"] == 1.0
    assert found.rows["expert"]["b"].measures == {"f1": 1.0, "exact_match": 1.0}
    truth = [
        {"text": text, "labels": [bool(one) for one in row]} for text, row in zip(TEXTS, yes, strict=True)
    ]
    Path(recipe.experts["b"].test or "").write_text("".join(json.dumps(row) + "\n" for row in truth))
    again = tm.evaluate_run(run, compare=False).rows["learned"]["b"]
    assert again.measures == found.rows["learned"]["b"].measures
    wrong = [{"text": text, "labels": [0.5, 0.0, 1.0]} for text in TEXTS]
    with pytest.raises(ValueError, match=r"example 0: labels is \[0\.5, 0\.0, 1\.0\], not a class number"):
        tm.evaluate_checkpoint(recipe.base, with_test(recipe, "b", wrong, tmp_path))


def test_labels_numbered_with_gaps(tmp_path: Path) -> None:
    """Outputs are 0 to 2 whatever id2label says; its names mean an output where the numbers are those."""
    recipe, models = write_heads(tmp_path, "Bert", {"a": LABELS})
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config |= {"id2label": {"0": "no", "2": "yes", "5": "maybe"}, "label2id": {"no": 0, "yes": 2, "maybe": 5}}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    told = logits(models["a"], recipe, TEXTS).argmax(-1).tolist()
    rows: list[dict[str, Any]] = [{"text": t, "label": i} for t, i in zip(TEXTS, told, strict=True)]
    run = run_of(with_test(recipe, "a", rows, tmp_path), tmp_path / "run")
    assert tm.evaluate_run(run, grid=()).scores["expert"] == {"a": 1.0}
    for label, words in (
        ("maybe", r"class 5 by the expert's id2label, and its 3 outputs are 0 to 2"),
        (3, "3 classes, 0 to 2"),
    ):
        rows[1]["label"] = label
        with pytest.raises(ValueError, match=rf"example 1: label is .*{words}"):
            tm.evaluate_checkpoint(recipe.base, with_test(recipe, "a", rows, tmp_path))


def test_numbers_as_texts(tmp_path: Path) -> None:
    """A regression's numbers in a file whose columns are texts."""
    recipe, models = write_heads(tmp_path, "Bert", {"a": {**LABELS, "num_labels": 1}})
    told = logits(models["a"], recipe, TEXTS)[:, 0].tolist()
    rows = [{"text": text, "label": repr(value)} for text, value in zip(TEXTS, told, strict=True)]
    run = run_of(with_test(recipe, "a", rows, tmp_path), tmp_path / "run")
    found = tm.evaluate_run(run, compare=False)
    assert found.metric.name == "pearson"
    rows[2]["label"] = "high"
    with pytest.raises(ValueError, match=r"example 2: label is 'high', not a number"):
        tm.evaluate_checkpoint(recipe.base, with_test(recipe, "a", rows, tmp_path))
