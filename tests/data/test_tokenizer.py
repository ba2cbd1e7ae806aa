"""Which positions count: padding never, answers by span or chat template, a decoder's own."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, T5Config

from tests.heads_world import write_tokenizer as write_heads_tokenizer
from tests.world import write_tokenizer
from trainmerge.data.columns import Columns
from trainmerge.data.examples import Example, read_examples
from trainmerge.data.token_checks import longest
from trainmerge.data.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
CHAT = [
    {"role": "user", "content": "red blue"},
    {"role": "assistant", "content": "good cat"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "dog"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    return tmp_path


def with_template(folder: Path) -> Tokenizer:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return Tokenizer(str(folder), 32)


def write(folder: Path, *rows: dict) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_padding_is_on_the_right_and_never_counts(folder: Path) -> None:
    inputs, mask = Tokenizer(str(folder), 32).encode([Example("red"), Example("red blue green")])
    assert mask.tolist() == [[True, False, False], [True, True, True]]
    assert torch.equal(mask, inputs["attention_mask"].bool())


def test_without_a_token_for_padding_another_special_one_is_taken(folder: Path) -> None:
    settings = folder / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    del content["pad_token"]
    settings.write_text(json.dumps(content))
    mask = Tokenizer(str(folder), 8).encode([Example("red"), Example("red blue")]).mask
    assert mask.tolist() == [[True, False], [True, True]]
    settings.write_text(json.dumps({**content, "unk_token": None}))
    with pytest.raises(ValueError, match=r"set pad_token in its tokenizer_config\.json"):
        Tokenizer(str(folder), 8)


def test_a_position_counts_if_the_token_it_predicts_is_in_a_span(folder: Path) -> None:
    text = "red blue good cat two"
    begin = text.index("good")
    example = Example(text, ((begin, begin + len("good cat")),))
    inputs, mask = Tokenizer(str(folder), 32).encode([example, Example("one two")])
    assert mask.tolist() == [[False, True, True, False, False], [True, True, False, False, False]]
    assert "offset_mapping" not in inputs


def test_only_the_assistants_turns_of_a_chat_count(folder: Path) -> None:
    tokenizer = with_template(folder)
    example = tokenizer.render(CHAT)
    assert example.text == "user red blue assistant good cat user two assistant dog "
    assert example.spans is not None
    assert [example.text[a:b].strip() for a, b in example.spans] == ["good cat", "dog"]
    (mask,) = tokenizer.encode([example]).mask
    words = example.text.split()
    assert [words[i + 1] for i in mask.nonzero().flatten()] == ["good", "cat", "dog"]


def test_chats_come_from_files(folder: Path) -> None:
    tokenizer = with_template(folder)
    path = write(folder, {"chat": CHAT}, {"chat": CHAT[:2]})
    examples = read_examples(path, Columns(messages="chat"), tokenizer.render)
    assert [len(example.spans or ()) for example in examples] == [2, 1]
    path = write(folder, {"chat": CHAT[:1]})
    with pytest.raises(
        ValueError, match=r"rows\.jsonl: example 0 has no chat in 'chat': it has no turn with the role"
    ):
        read_examples(path, Columns(messages="chat"), tokenizer.render)
    with pytest.raises(ValueError, match="no chat template"):
        read_examples(path, Columns(messages="chat"), Tokenizer(str(write_other(folder)), 32).render)


def write_other(folder: Path) -> Path:
    write_tokenizer(folder / "plain")
    return folder / "plain"


def test_a_decoders_positions_count(folder: Path) -> None:
    T5Config().save_pretrained(folder)
    tokenizer = Tokenizer(str(folder), 32)
    inputs, mask = tokenizer.encode(
        [Example("red blue green", target="cat"), Example("red", target="dog two")]
    )
    assert inputs["labels"].shape == (2, 2)
    assert mask.tolist() == [[True, False], [True, True]]
    inputs, mask = tokenizer.encode([Example("red blue green"), Example("red")])
    assert inputs["labels"].shape == mask.shape == (2, 1)
    assert mask.all()


def test_columns_are_read_as_they_are_named(folder: Path) -> None:
    Image.new("RGB", (2, 2)).save(folder / "a.png")
    row = {"body": "red blue", "where": [[0, 3]], "say": "cat", "see": "a.png"}
    path = write(folder, row, row, row)
    (example,) = read_examples(path, Columns("body", spans="where", target="say"), render, count=1)
    assert example == Example("red blue", ((0, 3),), "cat")
    examples = read_examples(path, Columns("body", image="see"), render)
    assert [e.image for e in examples] == [str(folder / "a.png")] * 3


def render(_: object) -> Example:
    raise AssertionError("no chat here")


@pytest.mark.parametrize(
    ("row", "columns", "words"),
    [
        ({"text": 3}, Columns(), "example 0 has 3 for 'text', which is not a text"),
        ({"text": "red", "s": [[0, 9]]}, Columns(spans="s"), r"not within its 3 characters"),
        ({"text": "red", "s": []}, Columns(spans="s"), r"not within its 3 characters"),
        ({"text": "red", "s": "all"}, Columns(spans="s"), r"spans are lists of \[begin, end\)"),
        ({"text": "red", "t": None}, Columns(target="t"), "None for 't', which is not a text"),
        ({"text": "red", "p": "no.png"}, Columns(image="p"), r"no picture .*no\.png"),
        ({"text": "red"}, Columns(target="t"), r"no column \['t'\]; it has \['text'\]"),
        ({"text": "red", "p": "x", "s": [[0, 1]]}, Columns(image="p", spans="s"), "all positions enter"),
    ],
)
def test_rows_that_break_a_promise(folder: Path, row: dict, columns: Columns, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_examples(write(folder, row), columns, render)


def test_pairs_of_texts(tmp_path):
    """Both texts of a pair, in transformers' own form; the longest counts both."""
    write_heads_tokenizer(tmp_path)
    tokenize = Tokenizer(str(tmp_path), 64)
    pair = Example("good bad", pair="red blue green")
    encoded = tokenize.encode([pair, Example("good", pair="red")])
    want = tokenize.transformers(["good bad", "good"], ["red blue green", "red"], padding=True)
    assert encoded.inputs["input_ids"].tolist() == want["input_ids"]
    assert encoded.mask.sum(1).tolist() == [8, 5]
    assert longest(tokenize, [pair]) == 8
    assert Tokenizer(str(tmp_path), 6).encode([pair]).inputs["input_ids"].shape == (1, 6)
