"""A LinearHead is refused where its file's model applies more than one matrix."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import trainmerge as tm
from tests.world import recipe, write_world
from trainmerge.run.heads import unusable_heads
from trainmerge.run.recipe import Recipe

SMALL = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 48}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    return root


def with_file(root: Path, file: Path, weight: str, bias: str | None) -> Recipe:
    merge = recipe(root)
    head = tm.LinearHead(str(file), weight, bias)
    return replace(merge, experts={"mood": replace(merge.experts["mood"], head=head)})


@pytest.mark.parametrize(
    ("model", "weight", "bias", "words"),
    [
        (BertForSequenceClassification(BertConfig(**SMALL)), "classifier.weight", "classifier.bias",
         "pooler"),
        (RobertaForSequenceClassification(RobertaConfig(**SMALL)), "classifier.out_proj.weight",
         "classifier.out_proj.bias", "classifier.dense"),
        (LlamaForSequenceClassification(LlamaConfig(**SMALL)), "score.weight", None, "last token"),
    ],
)  # fmt: skip
def test_classes_that_apply_more(
    world: Path, tmp_path: Path, model: PreTrainedModel, weight: str, bias: str | None, words: str
) -> None:
    model.save_pretrained(tmp_path)
    (problem,) = unusable_heads(with_file(world, tmp_path / "model.safetensors", weight, bias))
    assert problem.startswith("recipe.experts.mood.head: ")
    assert words in problem


def test_files_without_a_configuration(world: Path, tmp_path: Path) -> None:
    own = {"classifier.weight": torch.zeros(2, 32), "classifier.bias": torch.zeros(2)}
    body = {"bert.embeddings.word_embeddings.weight": torch.zeros(20, 32)}
    save_file({**own, **body}, tmp_path / "sound.safetensors")
    save_file({**own, "classifier.dense.weight": torch.zeros(32, 32)}, tmp_path / "deep.safetensors")
    names = ("classifier.weight", "classifier.bias")
    assert not list(unusable_heads(with_file(world, tmp_path / "sound.safetensors", *names)))
    (problem,) = unusable_heads(with_file(world, tmp_path / "deep.safetensors", *names))
    assert "it also has classifier.dense.weight" in problem
