"""Tokenizers compared as maps id -> token, in every file format; differences have id and tokens."""

import json
import struct
import warnings
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from trainmerge.checkpoints.tokenizer_check import tokenizer_mismatches

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<|endoftext|>", "red", "blue", "cat", "dog"]
SWAPPED = [*TOKENS[:7], "cat", "blue", "dog"]
Write = Callable[[Path, list[str]], None]


def ids(tokens: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def bert_words(folder: Path, tokens: list[str]) -> None:
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')


def words_alone(folder: Path, tokens: list[str]) -> None:
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens))


def gpt2(folder: Path, tokens: list[str]) -> None:
    (folder / "vocab.json").write_text(json.dumps(ids(tokens)))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')


def whole(folder: Path, tokens: list[str]) -> None:
    model = {"type": "WordLevel", "vocab": ids(tokens), "unk_token": "[UNK]"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))


def unigram(folder: Path, tokens: list[str]) -> None:
    model = {"type": "Unigram", "unk_id": 1, "vocab": [[token, -1.0] for token in tokens]}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))


def sentencepiece(folder: Path, tokens: list[str]) -> None:
    pieces = [b"\n" + bytes([len(t)]) + t.encode() + b"\x15" + struct.pack("<f", -1.0) for t in tokens]
    trainer = b"\x12\x02\x18\x02"  # trainer_spec {model_type: 2}
    (folder / "tokenizer.model").write_bytes(b"".join(b"\n" + bytes([len(p)]) + p for p in pieces) + trainer)


def tiktoken(folder: Path, tokens: list[str]) -> None:
    lines = [b64encode(token.encode()).decode() + f" {i}\n" for i, token in enumerate(tokens)]
    (folder / "qwen.tiktoken").write_text("".join(lines))


FORMATS = [bert_words, words_alone, gpt2, whole, unigram, sentencepiece, tiktoken]


def folders(path: Path) -> tuple[Path, Path]:
    for name in ("base", "expert"):
        (path / name).mkdir(exist_ok=True)
    return path / "base", path / "expert"


@pytest.mark.parametrize("write", FORMATS)
def test_an_ordinary_token_with_another_id_is_named(tmp_path: Path, write: Write) -> None:
    base, expert = folders(tmp_path)
    write(base, TOKENS)
    write(expert, TOKENS)
    assert tokenizer_mismatches(base, expert) == []
    write(expert, SWAPPED)
    (line,) = tokenizer_mismatches(base, expert)
    assert "token 7 is 'cat', the base's is 'blue' (2 differ)" in line


@pytest.mark.parametrize("theirs", [whole, gpt2, sentencepiece, words_alone])
def test_two_formats_of_one_vocabulary_agree(tmp_path: Path, theirs: Write) -> None:
    base, expert = folders(tmp_path)
    bert_words(base, TOKENS)
    theirs(expert, TOKENS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".* model\.type .* into other tokens")
        warnings.simplefilter("error", append=True)
        assert tokenizer_mismatches(base, expert) == []
    theirs(expert, SWAPPED)
    (line,) = tokenizer_mismatches(base, expert)
    assert "token 7 is 'cat', the base's is 'blue'" in line


@pytest.mark.parametrize("write", FORMATS)
def test_a_token_of_the_expert_only_is_named(tmp_path: Path, write: Write) -> None:
    base, expert = folders(tmp_path)
    write(base, TOKENS)
    write(expert, [*TOKENS, "<|turn|>"])
    with pytest.warns(UserWarning, match=r"the base's tokenizer lacks token 10 '<\|turn\|>'"):
        assert tokenizer_mismatches(base, expert) == []
    assert tokenizer_mismatches(base, expert, rows=10) == []  # beyond the merged rows
    with pytest.warns(UserWarning, match=r"lacks token 10 '<\|turn\|>' of the base's tokenizer"):
        assert tokenizer_mismatches(expert, base) == []


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
@pytest.mark.parametrize("write", [bert_words, gpt2, words_alone])
def test_added_tokens_are_read_from_either_file(tmp_path: Path, write: Write, file: str) -> None:
    base, expert = folders(tmp_path)
    write(base, TOKENS)
    write(expert, TOKENS)
    if file == "added_tokens.json":
        (expert / file).write_text('{"<|turn|>": 10}')
    else:
        old = json.loads((expert / file).read_text()) if (expert / file).is_file() else {}
        token = {"content": "<|turn|>", "special": True} | dict.fromkeys(
            ("lstrip", "rstrip", "normalized", "single_word"), False
        )
        (expert / file).write_text(json.dumps(old | {"added_tokens_decoder": {"10": token}}))
    with pytest.warns(UserWarning, match=r"token 10 '<\|turn\|>'"):
        assert tokenizer_mismatches(base, expert) == []


def test_an_adapters_added_tokens_are_compared_without_its_vocabulary(tmp_path: Path) -> None:
    base, expert = folders(tmp_path)
    bert_words(base, TOKENS)
    (expert / "added_tokens.json").write_text('{"<|turn|>": 10}')
    with pytest.warns(UserWarning, match=r"token 10 '<\|turn\|>'") as seen:
        assert tokenizer_mismatches(base, expert) == []
    assert len(seen) == 1  # none about the ordinary tokens, which the folder doesn't have


def test_added_tokens_that_differ_are_a_warning(tmp_path: Path) -> None:
    base, expert = folders(tmp_path)
    for folder, token in ((base, "<reserved>"), (expert, "<|turn|>")):
        gpt2(folder, TOKENS)
        (folder / "added_tokens.json").write_text(json.dumps({token: 10}))
    with pytest.warns(UserWarning, match=r"added token 10 is '<\|turn\|>', the base's '<reserved>'"):
        assert tokenizer_mismatches(base, expert) == []


def test_a_renamed_unused_token_is_a_warning(tmp_path: Path) -> None:
    base, expert = folders(tmp_path)
    bert_words(base, [*TOKENS, "[unused1]"])
    bert_words(expert, [*TOKENS, "mine"])
    with pytest.warns(UserWarning, match=r"'mine', the base's '\[unused1\]'"):
        assert tokenizer_mismatches(base, expert) == []


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    base, expert = folders(tmp_path)
    sentencepiece(base, TOKENS)
    whole(expert, ["<s>", *TOKENS])  # as fairseq's tokenizers shift sentencepiece's ids
    with pytest.warns(UserWarning, match="cannot be compared"):
        assert tokenizer_mismatches(base, expert) == []
    (expert / "tokenizer.json").rename(expert / "tekken.json")
    with pytest.warns(UserWarning, match="cannot be compared"):
        assert tokenizer_mismatches(base, expert) == []


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"model": 3}', '{"model": {"vocab": {"a": "b"}}}', "[" * 100_000]
)
def test_a_damaged_tokenizer_is_named(tmp_path: Path, text: str) -> None:
    base, expert = folders(tmp_path)
    whole(base, TOKENS)
    (expert / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"expert/tokenizer.json: not a tokenizer"):
        tokenizer_mismatches(base, expert)


def test_folders_without_a_tokenizer_are_not_compared(tmp_path: Path) -> None:
    base, expert = folders(tmp_path)
    whole(base, TOKENS)
    assert tokenizer_mismatches(base, expert) == []
    assert tokenizer_mismatches(expert, base) == []


BPE = {"red": 0, "r": 1, "e": 2, "d": 3, "re": 4, "ed": 5}
SPLIT = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    },
    "model": {"type": "BPE", "vocab": BPE, "merges": [["r", "e"], ["re", "d"], ["e", "d"]]},
}


def splits(folder: Path, **changes: object) -> None:
    (folder / "tokenizer.json").write_text(json.dumps({**SPLIT, **changes}))


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("model.merges", {"model": {**SPLIT["model"], "merges": ["e d", "r e", "re d"]}}),  # type: ignore[dict-item]
        ("normalizer", {"normalizer": {"type": "Lowercase"}}),
        ("normalizer", {"normalizer": None}),
        ("pre_tokenizer", {"pre_tokenizer": {**SPLIT["pre_tokenizer"], "use_regex": False}}),  # type: ignore[dict-item]
        ("pre_tokenizer", {"pre_tokenizer": {"type": "Whitespace"}}),
        ("model.ignore_merges", {"model": {**SPLIT["model"], "ignore_merges": True}}),  # type: ignore[dict-item]
    ],
)
def test_equal_tokens_that_are_found_in_another_way_are_named(
    tmp_path: Path, part: str, changes: dict[str, object]
) -> None:
    base, expert = folders(tmp_path)
    splits(base)
    splits(expert, **changes)
    with pytest.warns(UserWarning, match=r"split a text into other tokens") as found:
        assert tokenizer_mismatches(base, expert) == []
    (said,) = [str(one.message) for one in found]
    assert f"{expert / 'tokenizer.json'}: {part} differs from that of {base / 'tokenizer.json'}" in said


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {**SPLIT["model"], "merges": ["r e", "re d", "e d"]}},  # type: ignore[dict-item]
        {"model": {**SPLIT["model"], "ignore_merges": False, "fuse_unk": False, "dropout": None}},  # type: ignore[dict-item]
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}},
        {"truncation": None, "post_processor": None},
    ],
)
def test_one_way_of_splitting_in_another_spelling_is_the_same(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    base, expert = folders(tmp_path)
    splits(base)
    splits(expert, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer_mismatches(base, expert) == []


def test_merges_are_compared_with_a_merges_file(tmp_path: Path) -> None:
    base, expert = folders(tmp_path)
    for folder, merges in ((base, "r e\nre d\ne d\n"), (expert, "e d\nr e\nre d\n")):
        (folder / "vocab.json").write_text(json.dumps(BPE))
        (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}")
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.warns(UserWarning, match=r"model\.merges differs from that of .*vocab\.json"):
        assert tokenizer_mismatches(base, expert) == []


def test_scores_of_a_unigram_model_are_compared(tmp_path: Path) -> None:
    base, expert = folders(tmp_path)
    unigram(base, TOKENS)
    unigram(expert, TOKENS)
    file = expert / "tokenizer.json"
    file.write_text(file.read_text().replace('["red", -1.0]', '["red", -2.0]'))
    with pytest.warns(UserWarning, match=r"model\.vocab \(scores\) differs"):
        assert tokenizer_mismatches(base, expert) == []


def test_a_tokenizer_saved_again_in_another_format_is_the_same(tmp_path: Path) -> None:
    base, expert = folders(tmp_path)
    bert_words(base, TOKENS)
    AutoTokenizer.from_pretrained(base).save_pretrained(expert)
    (expert / "vocab.txt").unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer_mismatches(base, expert) == []


def sentence_marks(first: int, single: str = "<s> $A") -> dict[str, object]:
    made = TemplateProcessing(single=single, pair="<s> $A <s> $B", special_tokens=[("<s>", first)])
    content: dict[str, object] = json.loads(made.__getstate__())
    return content


BERT_MARKS = {"type": "BertProcessing", "cls": ["r", 1], "sep": ["e", 2]}
ROBERTA_MARKS = {**BERT_MARKS, "type": "RobertaProcessing", "trim_offsets": True, "add_prefix_space": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
TOKEN = {
    "id": 3, "content": "d", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False,
    "special": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (None, sentence_marks(0)),
        (sentence_marks(0), sentence_marks(1)),
        (sentence_marks(0), sentence_marks(0, "$A <s>")),
        (BERT_MARKS, ROBERTA_MARKS),  # they differ in pairs of texts
    ],
)
def test_marks_around_a_text_are_compared_by_their_ids(tmp_path: Path, ours: object, theirs: object) -> None:
    base, expert = folders(tmp_path)
    splits(base, post_processor=ours)
    splits(expert, post_processor=theirs)
    with pytest.warns(UserWarning, match=r"json: post_processor differs from that of"):
        assert tokenizer_mismatches(base, expert) == []


@pytest.mark.parametrize("key", ["lstrip", "rstrip", "single_word", "normalized", ""])
def test_how_added_tokens_are_found_is_compared(tmp_path: Path, key: str) -> None:
    base, expert = folders(tmp_path)
    splits(base, added_tokens=[TOKEN])
    splits(expert, added_tokens=[{**TOKEN, key: True}] if key else [])
    with pytest.warns(UserWarning, match=r"json: added_tokens \('d'\) differs from that of"):
        assert tokenizer_mismatches(base, expert) == []


@pytest.mark.parametrize("setting", ["byte_fallback", "fuse_unk"])
def test_settings_of_a_model_are_compared(tmp_path: Path, setting: str) -> None:
    base, expert = folders(tmp_path)
    splits(base, model={**SPLIT["model"], setting: False})  # type: ignore[dict-item]
    splits(expert, model={**SPLIT["model"], setting: True})  # type: ignore[dict-item]
    with pytest.warns(UserWarning, match=rf"model\.{setting} differs"):
        assert tokenizer_mismatches(base, expert) == []


@pytest.mark.parametrize(
    "model",
    [
        {"type": "WordPiece", "vocab": BPE, "unk_token": "r", "continuing_subword_prefix": "##",
         "max_input_chars_per_word": 100},
        {"type": "WordLevel", "vocab": BPE, "unk_token": "r"},
        {"type": "Unigram", "vocab": [[token, -1.0] for token in BPE], "unk_id": 0},
    ],
)  # fmt: skip
def test_models_of_other_types_are_named(tmp_path: Path, model: dict[str, object]) -> None:
    base, expert = folders(tmp_path)
    splits(base)
    splits(expert, model=model)
    with pytest.warns(UserWarning, match=rf"model\.type \({model['type']}, the base's is BPE\) differs"):
        assert tokenizer_mismatches(base, expert) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"decoder": BYTES},
        {"post_processor": BYTES},  # borders alone
        {"added_tokens": [{**TOKEN, "special": False}]},
        {"model": {key: value for key, value in SPLIT["model"].items() if key != "type"}},  # type: ignore[attr-defined]
    ],
)
def test_what_changes_no_id_is_not_a_difference(tmp_path: Path, changes: dict[str, object]) -> None:
    base, expert = folders(tmp_path)
    splits(base, added_tokens=[TOKEN])
    splits(expert, **{"added_tokens": [TOKEN], **changes})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer_mismatches(base, expert) == []
