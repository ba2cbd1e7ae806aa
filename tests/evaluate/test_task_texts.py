"""Examples that are tokenised once give the batches of the tokenizer itself."""

import json
from pathlib import Path

import pytest
import torch

import trainmerge.evaluate.task_texts
from tests.heads_world import write_tokenizer
from trainmerge.data.examples import Example
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.evaluate.task_texts import TaskTexts

TEXTS = ["red", "red blue green red blue", "a word that is unknown", "blue green"]
EXAMPLES = {
    "texts": [Example(text) for text in TEXTS],
    "pairs": [Example(text, pair="blue red") for text in TEXTS],
    "some pairs": [Example(text, pair="blue red" if i % 2 else None) for i, text in enumerate(TEXTS)],
    "spans": [Example(text, spans=((0, 3),) if i % 2 else None) for i, text in enumerate(TEXTS)],
    "templated": [Example(text, spans=((0, 3),), templated=True) for text in TEXTS],
}
ORDERS = ([0, 1, 2, 3], [3, 0], [1], [2, 1, 0])


def assert_same_batches(examples: list[Example], folder: Path, length: int) -> None:
    tokenize = Tokenizer(str(folder), length)
    texts = TaskTexts(examples, tokenize)
    assert texts.lengths() == [tokenize.encode([e]).inputs["input_ids"].shape[1] for e in examples]
    for order in ORDERS:
        found, wanted = texts.batch(order), tokenize.encode([examples[i] for i in order])
        assert found.inputs.keys() == wanted.inputs.keys()
        assert torch.equal(found.mask, wanted.mask)
        for name, tensor in wanted.inputs.items():
            assert found.inputs[name].dtype == tensor.dtype
            assert torch.equal(found.inputs[name], tensor), name


@pytest.mark.parametrize("stored", [256 << 20, 5000])  # in bytes: all of them, and two
@pytest.mark.parametrize("length", [16, 4])
@pytest.mark.parametrize("kind", EXAMPLES)
def test_batches_are_the_tokenizers(
    kind: str, length: int, stored: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainmerge.evaluate.task_texts, "STORED", stored)
    write_tokenizer(tmp_path)
    assert_same_batches(EXAMPLES[kind], tmp_path, length)


def test_targets_are_padded_apart(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"is_encoder_decoder": True}))
    assert_same_batches(
        [Example(t, target=other) for t, other in zip(TEXTS, TEXTS[::-1], strict=True)], tmp_path, 16
    )
