"""The positions of an example that count."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.family_world import write_bytes, write_words
from trainmerge.data.examples import Example
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.model.output_sizes import count_positions

LANGUAGE_MODEL: Any = SimpleNamespace(classifiers=[None])  # no head


def qwen2(folder: Path) -> Tokenizer:
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    return Tokenizer(str(folder), max_length=8)


def test_every_token_of_a_text_counts(tmp_path: Path) -> None:
    write_bytes(tmp_path)
    assert count_positions(LANGUAGE_MODEL, 0, [Example("w1 w20"), Example("w3")], qwen2(tmp_path)) == [5, 2]


def test_a_tokenizer_of_another_kind_of_model_makes_no_tokens(tmp_path: Path) -> None:
    write_words(tmp_path)  # transformers reads it as one of bytes, which has none of these words
    with pytest.raises(ValueError, match=rf"'w10 w20', and the tokenizer in {tmp_path} makes no token of it"):
        count_positions(LANGUAGE_MODEL, 0, [Example("w10 w20")], qwen2(tmp_path))
