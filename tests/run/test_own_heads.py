"""Which experts have a head of their own: by what the base lacks, by labels, by the recipe."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import trainmerge as tm
from tests.heads_world import ARCHITECTURES, expert_of, make, texts, write_heads, write_rows, write_tokenizer
from trainmerge.checkpoints import OwnHead
from trainmerge.cli import main
from trainmerge.fitting.preflight import check_tasks
from trainmerge.run.heads import task_heads
from trainmerge.run.recipe import Recipe
from trainmerge.run.recipe_files import calibration_files
from trainmerge.run.recipe_tasks import Expert

CLASSES = {"task": "ForSequenceClassification"}
NAMED = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
OTHERS = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}


def classifiers(root: Path, base: dict[str, Any], experts: dict[str, dict[str, Any]]) -> Recipe:
    """A classifier as base, and classifiers fine-tuned from it."""
    kind, settings = "BertForSequenceClassification", {**ARCHITECTURES["Bert"][1], "num_labels": 2}
    model = make(kind, settings, **base)
    model.save_pretrained(root / "base")
    write_tokenizer(root / "base")
    listed = {}
    for k, (name, labels) in enumerate(experts.items()):
        expert_of(model, kind, root / name, k, **labels)
        listed[name] = Expert(
            str(root / name), write_rows(root / f"{name}.jsonl", [{"text": t} for t in texts(k, 6)])
        )
    return Recipe(str(root / "base"), listed)


def found(recipe: Recipe) -> tuple[list[str], bool]:
    """The experts with a head of their own, and whether the base's classifier is merged."""
    opened = recipe.open()
    own = [name for name, head in task_heads(recipe, opened).items() if isinstance(head, OwnHead)]
    return own, "classifier.weight" in opened.task_vectors.deltas


@pytest.mark.parametrize(
    ("base", "experts", "own", "merged"),
    [
        ({}, {"a": {}, "b": {}}, [], True),
        ({}, {"a": NAMED, "b": NAMED}, [], True),  # the base's labels have no names
        (NAMED, {"a": NAMED, "b": OTHERS}, ["a", "b"], False),
        ({}, {"a": NAMED, "b": OTHERS}, ["a", "b"], False),
        ({}, {"a": {}, "b": {"problem_type": "multi_label_classification"}}, [], True),
    ],
)
@pytest.mark.filterwarnings("ignore:.*id2label is.*:UserWarning")
def test_labels_decide(
    tmp_path: Path, base: dict[str, Any], experts: dict[str, Any], own: list[str], merged: bool
) -> None:
    assert found(classifiers(tmp_path, base, experts)) == (own, merged)


@pytest.mark.filterwarnings("ignore:expert . changed classifier.*:UserWarning")
def test_the_recipe_decides(tmp_path: Path) -> None:
    recipe = classifiers(tmp_path, {}, {"a": {}, "b": {}})
    forced = replace(recipe, experts=recipe.experts | {"a": replace(recipe.experts["a"], head="own")})
    assert found(forced) == (["a"], True)  # b's head is still merged
    tm.MergeModule(forced, tm.Alignment())  # a written recipe reads back
    with pytest.raises(ValueError, match=r"the `head` of \['a'\] is `own`, but their files have none"):
        task_heads(forced, replace(forced, ignore=["classifier.*"]).open())


def test_a_part_of_a_head_that_no_file_has(tmp_path: Path) -> None:
    recipe, _ = write_heads(tmp_path, "Roberta", {"a": {**CLASSES, "num_labels": 2}})
    file = tmp_path / "a" / "model.safetensors"
    tensors = load_file(file)
    del tensors["classifier.dense.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"would be random: classifier\.dense\.weight"):
        task_heads(recipe)
    head = tm.LabelHead(["good", "bad"])
    given = replace(recipe, experts={"a": replace(recipe.experts["a"], head=head)})
    assert task_heads(given) == {"a": head}


@pytest.mark.parametrize(
    ("labels", "objective", "words"),
    [
        ({**CLASSES, "num_labels": 1}, tm.Entropy(), "is a regression.*use Alignment"),
        ({"task": "ForTokenClassification"}, tm.Entropy(diversity=1.0), "needs one class per text"),
    ],
)
def test_what_a_fit_refuses(
    tmp_path: Path, labels: dict[str, Any], objective: tm.Objective, words: str
) -> None:
    recipe, _ = write_heads(tmp_path, "Bert", {"a": labels})
    data = tm.Calibration(calibration_files(recipe), recipe.base, batch_size=2, max_length=16)
    with pytest.raises(ValueError, match=words):
        check_tasks(tm.MergeModule(recipe, objective), data)
    check_tasks(tm.MergeModule(recipe, tm.Alignment()), data)


def test_inspect_names_and_suggests_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, _ = write_heads(
        tmp_path, "Bert", {"a.1": {**CLASSES, "num_labels": 3}, "b": {"task": "ForQuestionAnswering"}}
    )
    experts = {name: {"path": e.path, "calibration": e.calibration} for name, e in recipe.experts.items()}
    file, made = tmp_path / "merge.yaml", tmp_path / "suggested.yaml"
    file.write_text(json.dumps({"recipe": {"base": recipe.base, "experts": experts}}))
    assert main(["inspect", str(file), "--suggest", str(made)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "a.1: its head is its own, of a BertForSequenceClassification (3 classes): it is not merged" in said
    )
    assert "b: its head is its own, of a BertForQuestionAnswering (answers)" in said
    assert made.read_text().count("head: own") == 2
    assert "trainmerge.Alignment" in made.read_text()


def as_pickle(folder: Path) -> None:
    """The folder's weights in a `pytorch_model.bin` instead."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("align", [(), (tm.Neurons(),)])
def test_pickled_weights_have_the_heads_of_the_same_weights(
    tmp_path: Path, align: tuple[tm.Align, ...]
) -> None:
    """Aligned experts are merged from the workspace, and their heads are read from their own files."""
    recipe, _ = write_heads(
        tmp_path, "Bert", {"a": {**CLASSES, "num_labels": 2}, "b": {**CLASSES, "num_labels": 3}}
    )
    recipe = replace(recipe, align=align, allow_pickle=True)
    expected = {n: dict(head.tensors()) for n, head in recipe.open(tmp_path / "safe").own_heads.items()}
    as_pickle(tmp_path / "b")
    found = recipe.open(tmp_path / "pickled").own_heads
    assert found.keys() == expected.keys() == {"a", "b"}
    for name, head in found.items():
        own = dict(head.tensors())
        assert own.keys() == expected[name].keys()
        assert all(torch.equal(own[key], expected[name][key]) for key in own), name
