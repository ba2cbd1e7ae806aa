"""A stranger's checkpoint runs no code, and no pattern in it takes forever."""

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.world import bert, write_tokenizer
from trainmerge.checkpoints.adapter_config import check_adapter_config
from trainmerge.checkpoints.meta_model import build_meta_model
from trainmerge.checkpoints.output import output_of
from trainmerge.data.pictures import load_processor
from trainmerge.data.tokenizer import Tokenizer

FILE = Path("adapter_config.json")


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with code of its own, and a user who answers every question with yes."""
    bert().save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    (tmp_path / "base" / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        "from transformers import BertConfig, PreTrainedTokenizerFast\n"
        "class T(PreTrainedTokenizerFast): pass\nclass C(BertConfig): pass\n"
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "base"


def test_code_of_a_tokenizer_never_runs(base: Path) -> None:
    auto = {"AutoTokenizer": [None, "own.T"]}
    edit(base / "tokenizer_config.json", auto_map=auto, tokenizer_class="T")
    edit(base / "config.json", auto_map=auto, model_type="own")
    with pytest.raises(ValueError, match="no tokenizer"):
        Tokenizer(str(base), 8)
    assert not (base.parent / "ran").exists()


def test_code_of_a_processor_never_runs(base: Path) -> None:
    (base / "processor_config.json").write_text(
        json.dumps({"processor_class": "P", "auto_map": {"AutoProcessor": "own.T"}})
    )
    with pytest.raises(ValueError, match="processor"):
        load_processor(str(base))
    assert not (base.parent / "ran").exists()


def test_code_of_a_configuration_never_runs(base: Path) -> None:
    edit(base / "config.json", auto_map={"AutoConfig": "own.C", "AutoModel": "own.C"}, model_type="own")
    with pytest.raises(ValueError, match="never run"):
        build_meta_model(base)
    assert not (base.parent / "ran").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "paged|someone/kernel@main:name"},
        {"_attn_implementation_internal": "flash_attention_2"},
        {"attn_implementation": {"": "sdpa", "text_config": "someone/kernel"}},
        {"text_config": {"experts_implementation": "someone/kernel"}},
        {"attn_implementation": ["someone/kernel"]},
    ],
)
def test_a_configuration_loads_no_kernel(base: Path, changes: dict[str, Any]) -> None:
    edit(base / "config.json", **changes)
    for read in (build_meta_model, output_of):
        with pytest.raises(ValueError, match=r"config\.json: \w+_implementation\w* is .*Remove"):
            read(base)


@pytest.mark.parametrize("own", ["eager", "sdpa", None])
def test_torchs_own_attention_is_accepted(base: Path, own: str | None) -> None:
    edit(base / "config.json", attn_implementation=own)
    assert build_meta_model(base).config._attn_implementation == (own or "sdpa")


def test_a_template_is_rendered_in_a_sandbox(base: Path) -> None:
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    edit(base / "tokenizer_config.json", chat_template=escape)
    with pytest.raises(Exception, match=r"unsafe|SecurityError"):
        Tokenizer(str(base), 8).render([{"role": "assistant", "content": "x"}])


@pytest.mark.parametrize(
    "pattern",
    [
        r"(.*.*.*)*Z", r"(([a-z])+.?)+[A-Z]$", r"(a|aa)*b", ".*" * 6 + "Z", "(", "(" * 5000,
        "a{1,99999999999}", r"(a+)+$", r"(a*)*b", r"(a?)*(a?)*b{6}(a?)*(a+)*c", r"(\w+\.?)*q",
        r"(\w+|\d+\.)*q", r"(\w+[.a])*q", r"(\.\w+\w)*q", r"((\w+\.)*)*q", r"(a{1,9})*b",
        r"(\w+\.){9}x|(aa|ab|a)*b", r"((?=a)a+)*b",
        r"(?i:(a+A)*)b", r"(\w+\.)*" * 6,
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["target_modules", "rank_pattern", "alpha_pattern", "layers_pattern"])
def test_a_pattern_that_may_take_forever_is_refused(key: str, pattern: str) -> None:
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {key} has the pattern"):
        check_adapter_config(
            FILE, {key: {pattern: 2} if key.endswith("k_pattern") or "alpha" in key else pattern}
        )


@pytest.mark.parametrize(
    "pattern",
    [
        "query",
        r".*\.layers\.\d+\.(self_attn|mlp)\.(up|down)_proj",
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|mlp).*?(?:qkv|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,})",
        r"^(?!.*vision).*q_proj$",
        r"(\w+\.)*(q_proj|v_proj)",
        r"(?:[^.]+\.)+(q|v)_proj$",
        r"model(\.\w+)*\.(q|v)_proj",
        r"((self_attn|mlp|\d+)\.)*q_proj",
        r"(?:layers\.\d+\.|[^l.]\w*\.)*q_proj",
        r"(\b[a-z_]+\.|\d+\.)*v_proj",
    ],
)  # fmt: skip
def test_patterns_in_use_are_accepted(pattern: str) -> None:
    check_adapter_config(FILE, {"target_modules": pattern, "rank_pattern": {pattern: 4}})
    assert not re.fullmatch(pattern, "a." * 2000 + "b" * 2000)  # ends


@pytest.mark.parametrize(
    "given", [[], [1], {"query": "x"}, {"query": None}, {"query": float("nan")}, "query"]
)
def test_patterns_map_to_numbers(given: Any) -> None:
    with pytest.raises(ValueError, match="alpha_pattern must map patterns to numbers"):
        check_adapter_config(FILE, {"alpha_pattern": given})


@pytest.mark.parametrize("changes", [{"megatron_config": {"a": 1}}, {"megatron_core": "os"}])
def test_peft_imports_no_module_of_an_adapters_choice(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="import a module"):
        check_adapter_config(FILE, changes)
    check_adapter_config(FILE, {"megatron_config": None, "megatron_core": "megatron.core"})


def test_an_adapter_that_repeats_layers_is_refused() -> None:
    """Its numbers for the base's own layers alone would be another function."""
    with pytest.raises(ValueError, match=r"adapter_config\.json: layer_replication makes a deeper model"):
        check_adapter_config(FILE, {"layer_replication": [[0, 2], [1, 2]]})
    check_adapter_config(FILE, {"layer_replication": None})


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
@pytest.mark.parametrize("value", ["16", None, float("nan"), True])
def test_rank_and_scale_are_numbers(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {key} must be a number, not"):
        check_adapter_config(FILE, {key: value})
    check_adapter_config(FILE, {"r": 2, "lora_alpha": 0.5})
