"""Scores under experts' own heads: transformers' own predictions are right, whatever the class of the head.

Legend: `B` examples, `T` tokens.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import trainmerge as tm
from tests.heads_world import ARCHITECTURES, texts, write_heads, write_rows
from trainmerge.data.examples import Columns, Example
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.run.recipe import Recipe, calibration_files

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
