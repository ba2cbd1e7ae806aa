"""The tokenizer and chat template of mergekit's files, and of merges in one line."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoTokenizer

import trainmerge as tm
from tests.chat_world import ADDED, TEMPLATE
from tests.checkpoints.test_chosen_vocabulary import (
    EMBEDDING,
    HEAD,
    by_token,
    expected,
    set_template,
    shuffle_base,
    write_models,
)
from trainmerge.checkpoints import open_checkpoint
from trainmerge.cli import main
from trainmerge.merging.document_card import mergekit_data
from trainmerge.merging.read_document import parse_document

A, B = 0.25, 0.75  # exact in float32 too
WEIGHTS = {"a": A, "b": B}
CHAT = [{"role": "user", "content": "good"}, {"role": "assistant", "content": "red"}]


def content(method: str = "task_arithmetic", **changes: Any) -> dict[str, Any]:
    models = [{"model": name, "parameters": {"weight": w}} for name, w in (("a", A), ("b", B))]
    based = {} if method == "linear" else {"base_model": "base"}
    first = [{"model": "base", "parameters": {"weight": 0.5}}] if method == "linear" else []
    shared = {"normalize": False} if method == "linear" else {}
    return {"merge_method": method, "models": [*first, *models], "parameters": shared, **based, **changes}


def merge(root: Path, **changes: Any) -> Path:
    (root / "m.yml").write_text(yaml.safe_dump(content(**changes)))
    return tm.merge_file(root / "m.yml", root / "out", overwrite=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models `base`, `a`, `b` in float64: a and b have the tokens of `ADDED`."""
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def root(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the models, which is the working directory."""
    place = Path(shutil.copytree(models, tmp_path / "models"))
    monkeypatch.chdir(place)
    return place


def assert_near(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_tokens_row_is_from_the_named_source(root: Path) -> None:
    tokens = {
        "<|end|>": {"source": "a", "force": True},
        "<|user|>": {"source": {"kind": "zero"}, "force": True},
        "red": {"source": {"kind": "model_token", "model": "b", "token": "blue"}, "force": True},
        "good": {"source": {"kind": "model_token", "model": "a", "token_id": 3}, "force": True},
        "<|tool|>": {"source": {"kind": "model_token", "model": "base", "token": "cat"}},
    }
    out = merge(root, tokenizer={"source": "union", "tokens": tokens})
    for name in (EMBEDDING, HEAD):
        base, a, b = (by_token(root / k, name) for k in ("base", "a", "b"))
        got, want = by_token(out, name), expected(root, name, WEIGHTS)
        want |= {
            "<|end|>": a["<|end|>"],
            "<|user|>": torch.zeros_like(a["<|end|>"]),
            "red": b["blue"],
            "good": open_checkpoint(root / "a").read(name)[3],
            "<|tool|>": base["cat"] + B * (b["<|tool|>"] - base["cat"]),  # base and a lack it, b has it
        }
        assert got.keys() == want.keys()
        for token, row in want.items():
            assert_near(got[token], row)


def test_a_source_without_force_counts_where_a_model_lacks_the_token(root: Path) -> None:
    out = merge(root, tokenizer={"source": "union", "tokens": {"<|tool|>": {"source": "b"}}})
    assert_near(by_token(out, HEAD)["<|tool|>"], by_token(root / "b", HEAD)["<|tool|>"])
    assert_near(by_token(out, HEAD)["red"], expected(root, HEAD, WEIGHTS)["red"])


def test_without_a_base_model_a_missing_row_is_the_mean_of_the_others(root: Path) -> None:
    out = merge(root, method="linear", tokenizer={"source": "union"})
    a, b = (by_token(root / k, EMBEDDING) for k in "ab")
    mean = (a["<|end|>"] + b["<|end|>"]) / 2
    assert_near(by_token(out, EMBEDDING)["<|end|>"], 0.5 * mean + A * a["<|end|>"] + B * b["<|end|>"])
    assert_near(by_token(out, EMBEDDING)["<|tool|>"], (0.5 + A + B) * b["<|tool|>"])


def test_the_first_model_is_no_base_for_a_token_that_another_lacks(root: Path) -> None:
    models = [{"model": k, "parameters": {"weight": 0.25}} for k in ("b", "a", "base")]
    out = merge(root, method="linear", models=models, tokenizer={"source": "union"})
    a, b = (by_token(root / k, HEAD) for k in "ab")
    mean = (a["<|end|>"] + b["<|end|>"]) / 2
    assert_near(by_token(out, HEAD)["<|end|>"], 0.25 * (a["<|end|>"] + b["<|end|>"] + mean))


def test_padding_and_the_base_models_tokens(root: Path) -> None:
    shuffle_base(root / "base")
    with pytest.warns(UserWarning, match="their rows are left out"):
        out = merge(root, tokenizer={"source": "base", "pad_to_multiple_of": 16})
    want = {t: row for t, row in expected(root, EMBEDDING, WEIGHTS).items() if not t.startswith("<|")}
    got = by_token(out, EMBEDDING)
    assert got.keys() == want.keys()
    for token, row in want.items():
        assert_near(got[token], row)
    assert len(open_checkpoint(out).read(EMBEDDING)) == 32
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 32


@pytest.mark.parametrize("words", [{"tokenizer_source": "base"}, {"tokenizer": {"source": "base"}}])
def test_the_base_models_tokenizer_cuts_the_experts_rows(root: Path, words: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="their rows are left out"):
        out = merge(root, **words)
    for token, row in by_token(out, HEAD).items():
        assert_near(row, expected(root, HEAD, WEIGHTS)[token])
    assert (out / "tokenizer.json").read_bytes() == (root / "base/tokenizer.json").read_bytes()


def test_a_merged_models_tokenizer_orders_the_rows(root: Path) -> None:
    shuffle_base(root / "base")
    with pytest.warns(UserWarning, match="lacks token .* '<|tool|>'"):
        out = merge(root, tokenizer_source="./a")
    own = AutoTokenizer.from_pretrained(root / "a").get_vocab()
    assert AutoTokenizer.from_pretrained(out).get_vocab() == own
    for token, row in by_token(out, EMBEDDING).items():
        assert_near(row, expected(root, EMBEDDING, WEIGHTS)[token])


def test_a_tokenizer_of_no_merged_model_needs_the_same_ids(root: Path) -> None:
    shutil.copytree(root / "base", root / "more/base")
    with pytest.raises(ValueError, match="none of the merged models, and its tokens have other ids"):
        merge(root, models=[{"model": "more/base", "parameters": {"weight": 1}}], tokenizer_source="a")
    set_template(root / "more/base")
    plain = [{"model": "more/base", "parameters": {"weight": 1}}]
    other = [{"model": "base", "parameters": {"weight": 1}}]
    assert not (merge(root, models=plain) / "chat_template.jinja").exists()
    (root / "m.yml").write_text(
        yaml.safe_dump({"merge_method": "linear", "models": other, "tokenizer_source": "more/base"})
    )
    out = tm.merge_file(root / "m.yml", root / "copied")
    assert (out / "chat_template.jinja").read_text() == TEMPLATE


def test_auto_is_the_most_common_template(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merge(root, tokenizer={"source": "union"}, chat_template="auto")
    assert "no model has a chat template" in capsys.readouterr().out
    set_template(root / "base", "theirs")
    for name in ADDED:
        set_template(root / name)
    out = merge(root, tokenizer={"source": "union"}, chat_template="auto")
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
    with pytest.raises(ValueError, match=r"its chat template writes .* set tokenizer: union"):
        merge(root, tokenizer_source="base", chat_template="auto")


def test_chatml_and_a_templates_text(root: Path) -> None:
    with pytest.warns(UserWarning, match=r"'<\|im_start\|>', '<\|im_end\|>' are no tokens"):
        out = merge(root, tokenizer={"source": "union"}, chat_template="chatml")
    text = AutoTokenizer.from_pretrained(out).apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True
    )
    turns = ("<|im_start|>user\ngood<|im_end|>\n", "<|im_start|>assistant\nred<|im_end|>\n")
    assert text == "".join(turns) + "<|im_start|>assistant\n"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = merge(root, tokenizer={"source": "union"}, chat_template=TEMPLATE)
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
    with pytest.raises(ValueError, match="chat_template: it cannot write a user's message"):
        merge(root, tokenizer_source="union", chat_template="{% for m in messages %}")


WRITTEN: list[dict[str, Any]] = [
    {},
    {"tokenizer_source": "union", "chat_template": "auto"},
    {"tokenizer": {"source": "a", "pad_to_multiple_of": 8}},
    {
        "tokenizer": {
            "source": "union",
            "tokens": {
                "x": {"source": "a", "force": True},
                "y": {"source": {"kind": "zero"}},
                "z": {"source": {"kind": "model_token", "model": "b", "token_id": 3}},
                "w": {"source": {"kind": "model_token", "model": "b", "token": "v"}},
            },
        }
    },
]


@pytest.mark.parametrize("changes", WRITTEN, ids=["none", "source", "padding", "tokens"])
def test_what_is_written_back_is_what_was_read(changes: dict[str, Any]) -> None:
    plain = mergekit_data(parse_document(content(**changes)))
    assert {key: plain[key] for key in plain if "token" in key or "chat" in key} == changes


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ({"<|none|>": {"source": "a"}}, "the merge's tokenizer has no token '<|none|>'"),
        ({"<|tool|>": {"source": "a"}}, "takes the row of '<|tool|>' of a, whose tokenizer lacks it"),
        (
            {"red": {"source": {"kind": "model_token", "model": "a", "token_id": 99}}},
            "has 23 rows, and none for the row of the token 'red'",
        ),
    ],
    ids=["unknown", "absent", "beyond"],
)
def test_tokens_that_nobody_has_are_named(root: Path, tokens: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("|", r"\|")):
        merge(root, tokenizer={"source": "union", "tokens": tokens})


def test_one_line_has_the_keys_of_a_recipe(root: Path) -> None:
    set_template(root / "a")
    words = ["merge", "base", "a", "b", "--weight", f"[{A}, {B}]", "-o"]
    assert main([*words, "one", "--tokenizer", "union", "--chat-template", "a"]) == 0
    assert main([*words, "two", "--vocabulary", "union"]) == 0
    with pytest.warns(UserWarning, match="'<.tool.>': their rows are left out"):
        assert main([*words, "three", "--tokenizer", "a"]) == 0
    want = expected(root, EMBEDDING, WEIGHTS)
    for folder in ("one", "two", "three"):
        for token, row in by_token(root / folder, EMBEDDING).items():
            assert_near(row, want[token])
    assert AutoTokenizer.from_pretrained("one").chat_template == TEMPLATE
    assert "<|tool|>" not in by_token(root / "three", EMBEDDING)


WRONG = [
    (
        ["base", "a", "-o", "out", "--vocabulary", "shared", "--tokenizer", "union"],
        "by their number: leave it",
    ),
    (["base", "a", "-o", "out", "--vocabulary", "union", "--tokenizer", "base"], "leave out one of them"),
    (
        ["base", "a", "-o", "out", "--chat-template", "b"],
        "chat_template is 'b'; it is auto, chatml, a merged",
    ),
    (["base", "a", "-o", "out", "--tokenizer", "none"], "tokenizer_source: none has no tokenizer files"),
    (["m.yml", "out", "--tokenizer", "union"], "--tokenizer goes with models, and m.yml is not"),
]


@pytest.mark.parametrize(("words", "error"), WRONG, ids=[error[:20] for _, error in WRONG])
def test_wrong_words_are_named(
    root: Path, words: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "m.yml").write_text(yaml.safe_dump(content()))
    assert main(["merge", *words]) == 1
    assert error in capsys.readouterr().err
    assert not (root / "out").exists()


def test_shared_rows_in_one_line(root: Path) -> None:
    words = ["merge", "base", "a", "b", "--weight", "0.5", "--vocabulary", "shared", "-o", "out"]
    assert main(words) == 0
    got = open_checkpoint(root / "out").read(HEAD)
    base, a, b = (open_checkpoint(root / k).read(HEAD)[: len(got)] for k in ("base", "a", "b"))
    assert_near(got, base + 0.5 * (a - base) + 0.5 * (b - base))
