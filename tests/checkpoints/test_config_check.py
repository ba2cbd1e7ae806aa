"""An expert's config.json against the base's: what changes the function, decoding, and nothing."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from tests.opening import open_task_vectors
from trainmerge.checkpoints import open_checkpoint
from trainmerge.checkpoints.config_check import configuration_mismatches
from trainmerge.checkpoints.meta_model import build_meta_model, quiet

SIZES: dict[str, Any] = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
SLIDING = {"max_window_layers": 1, "use_sliding_window": True, "sliding_window": 8, "layer_types": None}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config),
    "granite": (GraniteForCausalLM, GraniteConfig),
    "cohere": (CohereForCausalLM, CohereConfig),
    "olmo": (OlmoForCausalLM, OlmoConfig),
    "gpt2": (GPT2LMHeadModel, GPT2Config),
    "roberta": (RobertaModel, RobertaConfig),
    "bert": (BertForSequenceClassification, BertConfig),
}


def build(family: str, seed: int = 0) -> PreTrainedModel:
    model, config = FAMILIES[family]
    sizes = {"head_dim": 4, **SIZES} if family == "gemma2" else SIZES
    torch.manual_seed(seed)
    made: PreTrainedModel = model(config(**sizes))
    return made


def save(model: PreTrainedModel, folder: Path) -> Path:
    with quiet():
        model.save_pretrained(folder)
    return folder


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes one out."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def compare(base: Path, expert: Path) -> None:
    open_task_vectors(open_checkpoint(base), {"one": expert})


def sides(tmp_path: Path, family: str) -> tuple[Path, Path]:
    return save(build(family), tmp_path / "base"), save(build(family, 1), tmp_path / "expert")


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}}, "rope_theta is 70000.0"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ("llama", {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}, "heads is 2"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', the base has 'silu'"),
        ("llama", {"rms_norm_eps": 1e-3}, "rms_norm_eps is 0.001, the base has 1e-06"),
        ("qwen2", SLIDING, "layer_types is"),
        ("gemma2", {"final_logit_softcapping": 20.0}, "final_logit_softcapping is 20.0, the base has 30.0"),
        ("gemma2", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar is 16"),
        ("granite", {"residual_multiplier": 0.5}, "residual_multiplier is 0.5"),
        ("cohere", {"logit_scale": 0.25}, "logit_scale is 0.25"),
        ("olmo", {"clip_qkv": 2.0}, "clip_qkv is 2.0"),
        ("gpt2", {"n_head": 2}, "n_head is 2, the base has 4"),
        ("roberta", {"pad_token_id": 3}, "pad_token_id is 3"),  # positions count from it
    ],
)  # fmt: skip
def test_what_changes_the_function_is_an_error(
    tmp_path: Path, family: str, changes: dict[str, Any], named: str
) -> None:
    base, expert = sides(tmp_path, family)
    original = (expert / "config.json").read_text()
    edit(expert / "config.json", **changes)
    with pytest.raises(ValueError, match=re.escape(f"{expert / 'config.json'}:")) as error:
        compare(base, expert)
    assert named in str(error.value)
    (expert / "config.json").write_text(original)  # the remedy: the base's value
    compare(base, expert)


def test_the_same_settings_in_other_words_are_silent(tmp_path: Path) -> None:
    base, expert = sides(tmp_path, "llama")
    content = json.loads((expert / "config.json").read_text())
    theta = content.pop("rope_parameters")["rope_theta"]
    del content["hidden_act"], content["num_key_value_heads"], content["head_dim"]  # the defaults
    content |= {
        "rope_theta": theta, "rope_scaling": None, "torch_dtype": "float32", "transformers_version": "4.40.0",
        "_name_or_path": "elsewhere", "use_cache": False, "attention_dropout": 0.2, "eos_token_id": [2],
        "rms_norm_eps": 0.000001, "unsloth_fixed": True, "a_note": "of a trainer", "sliding_window": 4,
        "initializer_range": 0.5, "pretraining_tp": 2,
    }  # fmt: skip
    (expert / "config.json").write_text(json.dumps(content))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(base, expert)


def test_activations_are_compared_as_functions(tmp_path: Path) -> None:
    base, expert = sides(tmp_path, "gpt2")  # gelu_new
    edit(expert / "config.json", activation_function="gelu_pytorch_tanh")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(base, expert)


def test_unused_sliding_windows_are_silent_and_lengths_a_warning(tmp_path: Path) -> None:
    base, expert = sides(tmp_path, "qwen2")
    edit(expert / "config.json", max_window_layers=1, sliding_window=8, use_sliding_window=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(base, expert)
    edit(expert / "config.json", max_position_embeddings=64)
    with pytest.warns(UserWarning, match="max_position_embeddings is 64, the base has 32"):
        compare(base, expert)
    for folder in (base, expert):  # here the length sets the frequencies
        rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        edit(folder / "config.json", rope_parameters=rope)
    with pytest.raises(ValueError, match="max_position_embeddings is 64, the base has 32"):
        compare(base, expert)


def test_what_changes_decoding_is_a_warning(tmp_path: Path) -> None:
    base, expert = sides(tmp_path, "llama")
    edit(expert / "config.json", eos_token_id=[2, 5])
    edit(expert / "generation_config.json", eos_token_id=[2, 5], temperature=0.5, do_sample=True)
    with pytest.warns(UserWarning, match="the base has") as caught:
        compare(base, expert)
    said = " ".join(str(warning.message) for warning in caught)
    assert "config.json: eos_token_id is [2, 5], the base has 2" in said
    assert "generation_config.json: do_sample is True" in said
    assert "temperature is 0.5" in said
    (expert / "generation_config.json").write_text("{")
    with pytest.warns(UserWarning, match="eos"), pytest.raises(ValueError, match=r"generation_config\.json"):
        compare(base, expert)


def test_other_names_of_classes_are_a_warning_of_classifiers(tmp_path: Path) -> None:
    base, expert = sides(tmp_path, "bert")
    names = {"id2label": {"0": "good", "1": "bad"}, "label2id": {"good": 0, "bad": 1}}
    edit(expert / "config.json", **names)
    with pytest.warns(UserWarning, match=r"id2label is \{0: 'good', 1: 'bad'\}, the base has"):
        compare(base, expert)


def test_the_same_classes_in_another_order_are_a_warning_with_a_head_of_ones_own(tmp_path: Path) -> None:
    def config(*names: str) -> BertConfig:
        kind = ["BertForSequenceClassification"]
        return BertConfig(**SIZES, id2label=dict(enumerate(names)), architectures=kind)

    config("bad", "good").save_pretrained(tmp_path)
    base, file = build_meta_model(tmp_path), tmp_path / "config.json"
    with pytest.warns(UserWarning, match=r"\{0: 'good', 1: 'bad'\}, .* the same labels in another order"):
        assert not configuration_mismatches(base, config("good", "bad"), file, own_head=True)
    assert not configuration_mismatches(base, config("bad", "good"), file, own_head=True)
    assert not configuration_mismatches(base, config("red", "blue"), file, own_head=True)


def test_an_adapters_recorded_base_is_compared(tmp_path: Path) -> None:
    base, trained_on = sides(tmp_path, "llama")
    wrapped = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"], r=2))
    with quiet():
        wrapped.save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter/adapter_config.json", base_model_name_or_path=str(trained_on))
    compare(base, tmp_path / "adapter")
    edit(trained_on / "config.json", rms_norm_eps=1e-3)
    with pytest.raises(ValueError, match=r"one: .*expert/config\.json: rms_norm_eps is 0\.001"):
        compare(base, tmp_path / "adapter")
    edit(tmp_path / "adapter/adapter_config.json", base_model_name_or_path="an/id of the hub")
    compare(base, tmp_path / "adapter")
    (tmp_path / "adapter/config.json").write_text((trained_on / "config.json").read_text())
    with pytest.raises(ValueError, match=r"adapter/config\.json: rms_norm_eps is 0\.001"):
        compare(base, tmp_path / "adapter")


def test_a_tower_of_the_base_is_named_as_its_part(tmp_path: Path) -> None:
    text = {**SIZES, "vocab_size": 24}
    vision = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"image_size": 8, "patch_size": 4}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(tmp_path / "base")
    CLIPVisionModel(CLIPVisionConfig(**vision)).save_pretrained(tmp_path / "tower")
    CLIPTextModel(CLIPTextConfig(**text)).save_pretrained(tmp_path / "text")
    for name, part in (("tower", "vision_model"), ("text", "text_model")):
        with pytest.raises(ValueError, match=f"is the part '{part}' of the base's CLIPModel"):
            open_task_vectors(open_checkpoint(tmp_path / "base"), {"a": tmp_path / name})
    opened = open_task_vectors(open_checkpoint(tmp_path / "tower"), {"a": tmp_path / "tower"})
    assert opened.deltas  # that part alone as the base


def test_keys_that_only_other_classes_of_the_file_read_are_a_warning(tmp_path: Path) -> None:
    base, expert = sides(tmp_path, "gpt2")
    edit(expert / "config.json", summary_type="mean")  # GPT2DoubleHeadsModel's
    with pytest.warns(UserWarning, match="summary_type is 'mean'"):
        compare(base, expert)


def test_token_ids_of_mixed_types_are_compared(tmp_path: Path) -> None:
    base, expert = sides(tmp_path, "llama")
    (expert / "generation_config.json").write_text('{"eos_token_id": [3, "a"]}')
    with pytest.warns(UserWarning, match=r"eos_token_id is \[3, 'a'\]"):
        compare(base, expert)
