"""Settings of a tokenizer that transformers has by default, and that llama.cpp's converter has to be told."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.checkpoints.test_chosen_vocabulary import recipe_of, write_models
from trainmerge.checkpoints.stated_settings import state_settings

VOCABULARY = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "▁", "a", "▁a"])}
BOS, EOS = ("<s>", 1), ("</s>", 2)


def write(folder: Path, scheme: str, template: str = "$A", fallback: bool = True, **settings: Any) -> Path:
    """A tokenizer as sentencepiece's, whose first words have a space by `scheme`."""
    model = models.BPE(VOCABULARY, [("▁", "a")], unk_token="<unk>", byte_fallback=fallback)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=[BOS, EOS])
    special = {"bos_token": BOS[0], "eos_token": EOS[0], "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


def stated(folder: Path) -> dict[str, Any]:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    return {k: v for k in ("add_bos_token", "add_prefix_space") if (v := settings.get(k)) is not None}


CASES: list[tuple[dict[str, Any], dict[str, bool]]] = [
    ({"scheme": "never"}, {"add_bos_token": False, "add_prefix_space": False}),
    ({"scheme": "first"}, {"add_bos_token": False}),  # both ways: no value says that
    ({"scheme": "always"}, {"add_bos_token": False}),
    ({"scheme": "never", "template": "<s> $A"}, {"add_prefix_space": False}),
    ({"scheme": "never", "template": "$A </s>"}, {"add_prefix_space": False}),  # false may drop </s>
    ({"scheme": "always", "add_bos_token": True}, {"add_bos_token": True}),
    ({"scheme": "never", "fallback": False}, {}),
]


@pytest.mark.parametrize(("settings", "want"), CASES, ids=[str(i) for i in range(len(CASES))])
def test_what_is_absent_is_said_and_nothing_is_read_otherwise(
    tmp_path: Path, settings: dict[str, Any], want: dict[str, bool]
) -> None:
    folder = write(tmp_path / "tokenizer", **settings)
    texts = ["a", " a a", "<s>a</s> a", "a<s>", ""]
    before = [AutoTokenizer.from_pretrained(folder)(text).data for text in texts]
    state_settings(folder)
    assert stated(folder) == want
    assert [AutoTokenizer.from_pretrained(folder)(text).data for text in texts] == before
    state_settings(folder)  # again
    assert stated(folder) == want


def test_llama_cpp_reads_that_no_text_begins_with_bos(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed: pip install gguf")
    folder = write(tmp_path / "tokenizer", "first")
    assert "bos" not in gguf.SpecialVocab(folder).add_special_token  # so its default counts, true
    state_settings(folder)
    assert gguf.SpecialVocab(folder).add_special_token == {"bos": False}


def test_the_union_of_such_a_base_says_it(tmp_path: Path) -> None:
    root = write_models(tmp_path)
    (root / "base/tokenizer.model").write_bytes(b"pieces")  # transformers reads tokenizer.json
    folder = recipe_of(root).tokenizer_folder(tmp_path / "ws")
    assert stated(Path(folder)) == {"add_prefix_space": False}  # it has no bos_token
