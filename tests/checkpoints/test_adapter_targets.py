"""Which modules a LoRA can change, and which names peft matches."""

from pathlib import Path

import pytest
from transformers import (
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
)

from tests.world import bert, llama
from trainmerge.checkpoints import lora_targets, open_checkpoint
from trainmerge.checkpoints.adapter_targets import LoraTarget, LoraTargets
from trainmerge.checkpoints.meta_model import quiet


def targets(model: PreTrainedModel, folder: Path) -> LoraTargets:
    with quiet():
        model.save_pretrained(folder)
    return lora_targets(open_checkpoint(folder))


def kinds(found: LoraTargets) -> dict[str, str]:
    return {target.module: target.kind for target in found.modules.values()}


def test_a_tied_embedding_is_no_target(tmp_path: Path) -> None:
    tied, untied = targets(llama(), tmp_path / "tied"), targets(llama(tied=False), tmp_path / "untied")
    assert "model.embed_tokens" not in kinds(tied)
    assert kinds(untied)["model.embed_tokens"] == "embedding"
    assert kinds(untied)["lm_head"] == "linear"
    assert set(kinds(tied)) == {m for m in untied.every if m.endswith("_proj")}
    assert tied.parameters["model.norm.weight"] == "model.norm.weight"
    assert tied.task_type == "CAUSAL_LM"


def test_transposed_weights_and_convolutions(tmp_path: Path) -> None:
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    gpt2 = targets(
        GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, **tokens)), tmp_path / "g"
    )
    assert kinds(gpt2)["transformer.h.0.attn.c_attn"] == "transposed"
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    vit = targets(ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4)), tmp_path / "v")
    assert kinds(vit)["embeddings.patch_embeddings.projection"] == "convolution"
    assert not {"embeddings.position_embeddings", "embeddings.cls_token"} & vit.modules.keys()
    assert vit.task_type is None
    assert vit.model_class == ("ViTModel", "transformers.models.vit.modeling_vit")


def test_both_towers_of_clip(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": 9}, vision_config={**sizes, "image_size": 8, "patch_size": 4}
    )
    found = targets(CLIPModel(config), tmp_path / "c")
    names = [name for name in kinds(found) if name.endswith("mlp.fc1")]
    assert len(names) == 2
    assert found.patterns(names) == ["fc1"]
    assert found.patterns(names[:1]) == names[:1]


def test_names_of_modules_are_matched_as_peft_does() -> None:
    def of(*every: str) -> LoraTargets:
        return LoraTargets(Path(), {}, {}, every, None, ("", ""))

    found = of("a", "a.q", "a.k", "b", "b.q", "b.k")
    assert found.patterns(["a.q", "b.q"]) == ["q"]
    assert found.patterns(["a.q"]) == ["a.q"]
    assert found.patterns(["a.q", "b.q", "a.k", "b.k"]) == ["k", "q"]
    assert of("l.q", "d.l.q").patterns(["l.q"]) == r"l\.q"  # a list would match both


@pytest.mark.parametrize("kind", ["embedding", "linear"])
def test_names_in_the_file(kind: str) -> None:
    ends = [name.removeprefix("base_model.model.m.") for name in LoraTarget("m", kind).names()]  # type: ignore[arg-type]
    assert ends == (
        ["lora_embedding_A", "lora_embedding_B"]
        if kind == "embedding"
        else ["lora_A.weight", "lora_B.weight"]
    )


def test_a_head_over_an_encoder_and_a_pooler(tmp_path: Path) -> None:
    found = targets(bert(), tmp_path / "b")
    assert found.task_type == "FEATURE_EXTRACTION"
    assert kinds(found)["pooler.dense"] == "linear"
    assert kinds(found)["embeddings.word_embeddings"] == "embedding"


def test_modules_whose_weight_is_used_without_calling_them(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "vocab_size": 9, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 2}
    mamba = targets(MambaForCausalLM(MambaConfig(**sizes, tie_word_embeddings=False)), tmp_path / "m")
    assert kinds(mamba)["backbone.layers.0.mixer.in_proj"] == "linear"
    assert not {"backbone.layers.0.mixer.dt_proj", "backbone.layers.0.mixer.conv1d"} & kinds(mamba).keys()
    opt = OPTConfig(
        hidden_size=8, word_embed_proj_dim=8, vocab_size=9, num_hidden_layers=1, num_attention_heads=2,
        ffn_dim=8, max_position_embeddings=8,
    )  # fmt: skip
    found = kinds(targets(OPTForCausalLM(opt), tmp_path / "o"))
    assert "model.decoder.embed_positions" not in found  # it adds an offset to its input
    assert found["model.decoder.layers.0.fc1"] == "linear"
    t5 = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9)
    assert (
        kinds(targets(T5EncoderModel(t5), tmp_path / "t"))["encoder.block.0.layer.1.DenseReluDense.wo"]
        == "linear"
    )


def test_modules_that_peft_refuses_are_named(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "vocab_size": 9, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 2}
    found = targets(MambaForCausalLM(MambaConfig(**sizes)), tmp_path / "m")
    config = {"peft_type": "LORA", "r": 1, "target_modules": ["out_proj"]}
    with pytest.raises(ValueError, match=r"peft has no LoRA of these modules.*out_proj"):
        found.check(config, {})
