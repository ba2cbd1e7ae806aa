"""The data order is a function of (seed, step); every mistake in a file is one clear error."""

import json
import warnings
from collections import Counter
from pathlib import Path

import datasets
import pytest

from tests.world import write_tokenizer
from trainmerge.data.examples import Example, warn_of_overlap
from trainmerge.data.steps import Steps, step_indices
from trainmerge.data.text_files import load_examples
from trainmerge.data.tokenizer import Tokenizer


def test_every_example_is_seen_once_before_any_is_seen_again() -> None:
    seen = [i for step in range(7) for i in step_indices(seed=3, expert=1, step=step, size=4, count=10)]
    assert Counter(seen[:10]) == Counter(range(10))
    assert Counter(seen[10:20]) == Counter(range(10))
    assert seen[:10] != seen[10:20]


def test_order_depends_on_seed_and_expert_only() -> None:
    first = [step_indices(0, 0, step, 5, 23) for step in range(9)]
    assert first == [step_indices(0, 0, step, 5, 23) for step in range(9)]
    assert first != [step_indices(1, 0, step, 5, 23) for step in range(9)]
    assert first != [step_indices(0, 1, step, 5, 23) for step in range(9)]


def test_batches_larger_than_the_set_run_on_across_the_seam() -> None:
    assert Counter(step_indices(0, 0, 0, 6, 3)) == Counter({0: 2, 1: 2, 2: 2})


def test_ranks_share_a_batch_without_overlap(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    texts = [[Example("red " * (i + 1)) for i in range(8)]]
    tokenize = Tokenizer(str(tmp_path), 16)
    (whole,) = Steps(texts, tokenize, 4, seed=0)[2]
    parts = [Steps(texts, tokenize, 4, 0, rank, 2)[2][0] for rank in range(2)]
    lengths = [sorted(batch.mask.sum(1).tolist()) for batch in parts]
    assert sorted(lengths[0] + lengths[1]) == sorted(whole.mask.sum(1).tolist())


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "txt", "saved"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    data = datasets.Dataset.from_dict({"text": ["red cat", "blue dog"]})
    path = tmp_path / f"data.{suffix}"
    match suffix:
        case "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in data))
        case "csv":
            path.write_text("text\nred cat\nblue dog\n")
        case "parquet":
            data.to_parquet(str(path))
        case "txt":
            path.write_text("red cat\nblue dog\n")
        case "saved":
            data.save_to_disk(str(path))
    assert load_examples(str(path), ["text"])["text"][:] == ["red cat", "blue dog"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "no such file"),
        ("empty.jsonl", "", "empty"),
        ("blank.csv", "text\n", "no examples in it"),
        ("other.jsonl", '{"body": "x"}\n', r"no column \['text'\]; it has \['body'\]"),
        ("data.pdf", "x", "unknown format"),
        ("broken.jsonl", "{not json\n", "cannot be read"),
        ("null.jsonl", '{"text": "x"}\n{"text": null}\n', "example 1.*must be a text"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_examples(str(path), ["text"])
    assert name in str(error.value)


def test_overlap_with_test_examples_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="news: 1 of 2 test examples"):
        warn_of_overlap("news", ["a", "b"], ["b", "c"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_overlap("news", ["a"], ["b"])
