"""Exports as other programs read them: llama.cpp by its table of names, vLLM by its documented fields."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import trainmerge as tm
from tests.world import WORDS, nudge, write_tokenizer
from trainmerge.checkpoints.meta_model import quiet

SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS) + 2, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
FAMILIES = {  # name in gguf -> a model; transformers' names are those that vLLM's registry has
    "LLAMA": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "QWEN2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "MISTRAL": lambda: MistralForCausalLM(MistralConfig(**SIZES, tie_word_embeddings=False)),
}
ARCHITECTURE = {"LLAMA": "LLAMA", "QWEN2": "QWEN2", "MISTRAL": "LLAMA"}  # llama.cpp has one for both
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
OF_LAYERS = {"ROPE_FREQS", "ATTN_ROT_EMBD"}  # of other files, or computed


@pytest.fixture(scope="module", params=list(FAMILIES))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A family, and its `base`, `merged` in several files, and `adapter`."""
    root = tmp_path_factory.mktemp(request.param)
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(0)
        model: PreTrainedModel = FAMILIES[request.param]()
        if seed:
            nudge(model, seed)
        with quiet():
            model.save_pretrained(root / name)
        write_tokenizer(root / name)
    experts = [root / "a", root / "b"]
    tm.merge_models(root / "base", experts, root / "merged", shard_size="8kB", dtype="bfloat16")
    tm.extract(root / "base", root / "a", root / "adapter", tm.AdapterForm(rank=16, rest="leave"))
    return request.param, root


def names_of(folder: Path) -> dict[str, str]:
    """Tensor -> file."""
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), file.name)
    return found


def test_llama_cpp_knows_every_name(world: tuple[str, Path]) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed: pip install gguf")
    family, root = world
    architecture = gguf.MODEL_ARCH[ARCHITECTURE[family]]
    table = gguf.get_tensor_name_map(architecture, SIZES["num_hidden_layers"])
    names = names_of(root / "merged")
    found = {name: table.get_type_and_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    assert [name for name, own in found.items() if own is None] == []
    assert len({own for _, own in found.values()}) == len(names)
    needed = {kind for kind in gguf.MODEL_TENSORS[architecture] if kind.name not in OF_LAYERS}
    needed -= {kind for kind in needed if kind.name.endswith(("_EXP", "GATE_INP"))}  # of mixtures
    if family == "QWEN2":
        needed.remove(gguf.MODEL_TENSOR.OUTPUT)  # tied: the embedding is the head
    assert {kind for kind, _ in found.values()} == needed


def test_index_files_and_configuration_agree(world: tuple[str, Path]) -> None:
    """What both require: every tensor in the file that the index names, and no other; one dtype."""
    family, root = world
    names = names_of(root / "merged")
    index = json.loads((root / "merged/model.safetensors.index.json").read_text())
    assert index["weight_map"] == names
    assert len({*names.values()}) > 1
    assert names.keys() == names_of(root / "base").keys()
    config = json.loads((root / "merged/config.json").read_text())
    assert config["architectures"] == [f"{family.title()}ForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert ("lm_head.weight" in names) != config["tie_word_embeddings"]
    tensors = {k: v for file in {*names.values()} for k, v in load_file(root / "merged" / file).items()}
    assert {one.dtype for one in tensors.values()} == {torch.bfloat16}
    assert len(tensors["model.embed_tokens.weight"]) == config["vocab_size"]


def test_vllm_reads_the_adapter(world: tuple[str, Path]) -> None:
    """Its loader's rules: the fields of `PEFTHelper`, modules by the last part of their name, one rank."""
    family, root = world
    wanted = LINEAR if family == "QWEN2" else {*LINEAR, "lm_head"}  # a tied head is an embedding
    config = json.loads((root / "adapter/adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 16  # the scale alpha / r is 1
    assert (config["bias"], config["modules_to_save"]) == ("none", None)
    assert (config["use_dora"], config["use_rslora"]) == (False, False)
    assert set(config["target_modules"]) == wanted
    for name, part in load_file(root / "adapter/adapter_model.safetensors").items():
        first, second, *module, side, end = name.split(".")
        assert (first, second, end) == ("base_model", "model", "weight")
        assert f"{'.'.join(module)}.weight" in names_of(root / "base")
        assert module[-1] in wanted
        assert part.shape[side == "lora_B"] <= config["r"]
