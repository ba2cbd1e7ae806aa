"""Which characters of a chat count, and special tokens that are in a text already."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer

from tests.world import WORDS, write_tokenizer
from trainmerge.data.columns import Columns
from trainmerge.data.examples import Example, read_examples
from trainmerge.data.token_checks import check_embedding_rows
from trainmerge.data.tokenizer import Tokenizer

SEP = "{% for m in messages %}{{ m.role }}: {{ m.content }} | {% endfor %}"
PROMPT = "{% if add_generation_prompt %}assistant: {% endif %}"
CHAT = [
    {"role": "user", "content": "red"},
    {"role": "assistant", "content": "one two"},
    {"role": "user", "content": "blue"},
    {"role": "assistant", "content": "three"},
]
# Earlier turns of the assistant lose their first word, as reasoning is left out.
FORGETS = (
    "{% for m in messages %}{% set c = m.content %}"
    "{% if m.role == 'assistant' and not loop.last %}{% set c = c.split(' ')[-1] %}{% endif %}"
    "{{ m.role }}: {{ c }} | {% endfor %}" + PROMPT
)
MARKED = FORGETS.replace("{{ c }}", "{% generation %}{{ c }}{% endgeneration %}", 1).replace(
    "{% generation %}{{ c }}{% endgeneration %}",
    "{% if m.role == 'assistant' %}{% generation %}{{ c }}{% endgeneration %}{% else %}{{ c }}{% endif %}",
)


def tokenizer(folder: Path, template: str | None = None, around: str | None = None) -> Tokenizer:
    write_tokenizer(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    loaded.add_special_tokens({"bos_token": "[BOS]", "eos_token": "[EOS]"})
    if around:
        names = [("[BOS]", loaded.bos_token_id), ("[EOS]", loaded.eos_token_id)]
        loaded._tokenizer.post_processor = processors.TemplateProcessing(around, special_tokens=names)
    loaded.chat_template = template
    loaded.save_pretrained(folder)
    return Tokenizer(str(folder), 16)


def spoken(example: Example) -> list[str]:
    return [example.text[begin:end] for begin, end in example.spans or ()]


def write_chats(folder: Path, *chats: list[dict[str, str]]) -> str:
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps({"chat": chat}) + "\n" for chat in chats))
    return str(path)


def test_turns_that_the_template_rewrites_are_left_out_and_counted_once(tmp_path: Path) -> None:
    tokenize = tokenizer(tmp_path, FORGETS)
    assert spoken(tokenize.render(CHAT[:2])) == ["one two | "]  # one turn: nothing is rewritten
    longer = [*CHAT, {"role": "user", "content": "dog"}, {"role": "assistant", "content": "red cat"}]
    path = write_chats(tmp_path, CHAT[:2], CHAT, longer)
    with pytest.warns(UserWarning, match="turns of the assistant") as found:
        examples = read_examples(path, Columns(messages="chat"), tokenize.render)
    # "three" has one word, and is written in the same way whatever follows.
    assert list(map(spoken, examples)) == [["one two | "], ["three | "], ["three | ", "red cat | "]]
    (said,) = [str(one.message) for one in found]
    assert said.startswith(f"{path}: 2 of 6 turns of the assistant do not enter the loss, the first in exam")
    inputs, mask = tokenize.encode(examples[1:2])
    predicted = inputs["input_ids"][0, 1:][mask[0, :-1]]
    assert tokenize.transformers.decode(predicted) == "three [UNK]"


def test_a_chat_without_a_turn_that_can_be_located_is_refused_with_its_number(tmp_path: Path) -> None:
    tokenize = tokenizer(tmp_path, FORGETS)
    path = write_chats(tmp_path, CHAT[:2], CHAT[:3])
    with pytest.raises(
        ValueError, match=r"chats\.jsonl: example 1: the chat template writes a turn .* prefix"
    ):
        read_examples(path, Columns(messages="chat"), tokenize.render)
    examples = read_examples(path, Columns(messages="chat"), tokenize.render, located=False)
    assert [example.spans for example in examples] == [None, None]


def test_a_chat_without_an_assistant_is_a_text_where_no_turn_is_needed(tmp_path: Path) -> None:
    tokenize = tokenizer(tmp_path, SEP + PROMPT)
    (example,) = read_examples(
        write_chats(tmp_path, CHAT[:1]), Columns(messages="chat"), tokenize.render, located=False
    )
    assert example.text == "user: red | "
    assert tokenize.encode([example]).mask.all()


def test_the_templates_own_marks_say_what_counts(tmp_path: Path) -> None:
    assert spoken(tokenizer(tmp_path, MARKED).render(CHAT)) == ["two", "three"]


def test_a_template_that_reads_the_clock_gets_a_fixed_date(tmp_path: Path) -> None:
    template = "\n{{ strftime_now('%d %b %Y, %H:%M:%S.%f %-d') }} | " + SEP + PROMPT
    example = tokenizer(tmp_path, template).render(CHAT)
    assert example.text.startswith("\n26 Jul 2024, 00:00:00.000000 26 | user: red")
    assert spoken(example) == ["one two | ", "three | "]


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must alternate') }}", "{{ messages[9].content }}", "{{ 1 / 0 }}", "{%"],
)
def test_a_template_that_fails_is_named(tmp_path: Path, template: str) -> None:
    tokenize = tokenizer(tmp_path, template)
    with pytest.raises(ValueError, match="the chat template rejects it"):
        tokenize.render(CHAT)


@pytest.mark.parametrize("around", ["[BOS] $A", "[BOS] $A [EOS]", "$A [EOS]", None])
def test_special_tokens_are_not_added_twice(tmp_path: Path, around: str | None) -> None:
    tokenize = tokenizer(tmp_path, around=around)
    written = (around or "$A").replace("$A", "red blue")
    (expected,) = tokenize(["red blue"])["input_ids"].tolist()
    if around != "$A [EOS]":  # a text that ends with EOS may go on, in another document
        assert tokenize([written])["input_ids"].tolist() == [expected]
    if around and around.startswith("[BOS]"):
        assert tokenize(["[BOS]red blue"])["input_ids"].tolist() == [expected]


def test_a_batch_of_both_kinds_is_that_of_one_kind(tmp_path: Path) -> None:
    tokenize = tokenizer(tmp_path, around="[BOS] $A [EOS]")
    plain = [Example("red", ((0, 3),)), Example("one two three", ((4, 7),)), Example("cat dog", ((0, 3),))]
    mixed = [plain[0], Example("[BOS]one two three", ((9, 12),)), plain[2]]
    (inputs, mask), (expected, expected_mask) = tokenize.encode(mixed), tokenize.encode(plain)
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[key], expected[key]) for key in expected)
    assert torch.equal(mask, expected_mask)


def test_a_token_beyond_the_embedding_is_named(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    rows = len(WORDS) + 2
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": rows}))
    tokenize = Tokenizer(str(tmp_path), 16)
    check_embedding_rows(tokenize, [Example("red blue")])
    for texts in ([Example("red [EOS]")], [Example("red")] * 70 + [Example("[EOS]")]):
        with pytest.raises(
            ValueError, match=rf"token {rows + 1} '\[EOS\]', but config.json gives .* {rows} rows"
        ):
            check_embedding_rows(tokenize, texts)
    with pytest.raises(ValueError, match=rf"{rows} rows"):
        tokenize(["[EOS]"])


@pytest.mark.parametrize(
    "chat",
    ["[]", {"role": "user", "content": "red"}, [{"from": "human", "value": "red"}], [{"role": 3}], ["red"]],
)
def test_what_is_no_chat_is_shown_with_the_form_of_one(tmp_path: Path, chat: object) -> None:
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}))
    words = tokenizer(tmp_path / "model", SEP + PROMPT)
    with pytest.raises(ValueError, match=r"example 0 has .* for 'messages': a chat is a list of turns"):
        read_examples(str(tmp_path / "chats.jsonl"), Columns(messages="messages"), words.render)
