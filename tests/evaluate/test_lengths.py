"""Test texts and targets that are longer than the model, refused before a weight is read."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.world import languages_recipe, write_languages, write_tokenizer
from trainmerge.data.columns import Columns
from trainmerge.data.examples import Example
from trainmerge.data.token_checks import check_lengths
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.evaluate.tasks import load_tasks


def test_a_test_text_is_no_longer_than_the_model(tmp_path: Path) -> None:
    recipe = languages_recipe(write_languages(tmp_path))
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"text": "red " * 40}) + "\n")
    experts = {name: replace(expert, test=str(long)) for name, expert in recipe.experts.items()}
    recipe = replace(recipe, experts=experts)
    with pytest.raises(ValueError, match=r"long\.jsonl: an example of 40 tokens .* 32 .*--max-length to 32"):
        load_tasks(recipe, Tokenizer(recipe.base, 64), Columns())
    load_tasks(recipe, Tokenizer(recipe.base, 32), Columns())


def test_a_target_is_no_longer_than_the_decoder(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bart", "is_encoder_decoder": True}))
    tokenize, examples = (
        Tokenizer(str(tmp_path), 64),
        [Example("red", target="red " * 9), Example("red", target="")],
    )
    check_lengths(tokenize, examples, (1, 9), "Bart", "data.max_length")
    with pytest.raises(ValueError, match="a target of 9 tokens is over the model's limit of 8 positions"):
        check_lengths(tokenize, examples, (1, 8), "Bart", "data.max_length")
    check_lengths(Tokenizer(str(tmp_path), 8), examples, (1, 8), "Bart", "data.max_length")
