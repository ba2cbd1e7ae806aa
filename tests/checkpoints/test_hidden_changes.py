"""Changes of an expert that no merge contains are named: batch statistics, ignored tensors, lost bases."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import ResNetConfig, ResNetModel

import trainmerge as tm
from tests.world import llama, nudge


def resnet() -> ResNetModel:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    return ResNetModel(config)


def words_of(recipe: tm.Recipe, workspace: Path | None = None) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recipe.open(workspace)
    return [str(word.message) for word in caught if "expert " in str(word.message)]


def test_batch_statistics_of_an_expert(tmp_path: Path) -> None:
    base = resnet()
    base.save_pretrained(tmp_path / "base")
    for name, moved in (("a", True), ("b", False)):
        model = copy.deepcopy(base)
        nudge(model, 1)
        if moved:
            model.train()(pixel_values=1 + torch.randn(4, 3, 32, 32))
        model.save_pretrained(tmp_path / name)
    recipe = tm.Recipe(str(tmp_path / "base"), {n: tm.Expert(str(tmp_path / n)) for n in "ab"})
    (words,) = words_of(recipe)
    assert words.startswith("expert a has statistics of its own")
    assert "running_mean" in words
    assert "running_var" in words
    assert "num_batches" not in words


def test_ignored_tensors_that_a_full_expert_changed(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    for name in ("norms", "rest"):
        model = llama()
        nudge(model.model.norm if name == "norms" else model.model.layers, 3)
        model.save_pretrained(tmp_path / name)
    experts = {n: tm.Expert(str(tmp_path / n)) for n in ("norms", "rest")}
    (words,) = words_of(tm.Recipe(str(tmp_path / "base"), experts, ignore=["model.norm.*", "*up_proj*"]))[:1]
    assert words.startswith("expert norms changed model.norm.weight, which `ignore` leaves")
    assert "teacher is not the expert" in words
    assert words_of(tm.Recipe(str(tmp_path / "base"), experts, ignore=["lm_head.*"])) == []


def test_ignored_tensors_of_an_adapter(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    adapter = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapter.named_parameters():
        if "q_proj.lora_B" in name:
            nn.init.ones_(parameter)
    adapter.save_pretrained(tmp_path / "a")
    recipe = tm.Recipe(
        str(tmp_path / "base"), {"a": tm.Expert(str(tmp_path / "a"))}, ignore=["*q_proj.weight"]
    )
    (words,) = words_of(recipe)
    assert "model.layers.0.self_attn.q_proj.weight, model.layers.1.self_attn.q_proj.weight" in words
    assert words_of(tm.Recipe(recipe.base, recipe.experts, ignore=["*v_proj.weight"])) == []  # its B is zero


def test_a_pissa_adapter_of_a_random_base_is_refused_and_its_conversion_is_read(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, init_lora_weights="pissa_niter_4", target_modules=["q_proj", "v_proj"])
    model: PeftModel = get_peft_model(llama(), config)
    model.peft_config["default"].init_lora_weights = True  # the initial adapter, as peft's example saves it
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa_niter_4"
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(
        ValueError, match=r"adapter_config.json: init_lora_weights is 'pissa_niter_4'.*Convert"
    ):
        tm.Recipe(str(tmp_path / "base"), {"a": tm.Expert(str(tmp_path / "trained"))}).open(tmp_path / "w")
    initial = str(tmp_path / "initial")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=initial)
    recipe = tm.Recipe(str(tmp_path / "base"), {"a": tm.Expert(str(tmp_path / "converted"))})
    deltas = recipe.open(tmp_path / "w").task_vectors.deltas
    base = load_file(tmp_path / "base" / "model.safetensors")
    for name, weight in model.merge_and_unload().named_parameters():
        if name in deltas:
            merged = base[name] + deltas[name].dense()[0]
            torch.testing.assert_close(merged, weight.detach(), rtol=1e-4, atol=1e-5)
    assert len(deltas) == 4


@pytest.mark.parametrize("start", ["corda", "lora_ga"])
def test_an_adapter_whose_start_needs_its_texts_is_refused(start: str, tmp_path: Path) -> None:
    """peft loads `lora_ga` without a word, on the base that it was not trained on."""
    llama().save_pretrained(tmp_path / "base")
    get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": start}))
    with pytest.raises(ValueError, match=rf"init_lora_weights is '{start}': .* not in the adapter.*Convert"):
        tm.Recipe(str(tmp_path / "base"), {"a": tm.Expert(str(tmp_path / "a"))}).open(tmp_path / "w")
