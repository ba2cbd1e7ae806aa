"""Ties changed on one side are refused, and the remedy, an untied copy, has both sides merged."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import trainmerge as tm
from tests.opening import open_task_vectors
from trainmerge.checkpoints import open_checkpoint
from trainmerge.checkpoints.meta_model import quiet
from trainmerge.task_vectors.delta import TaskVectors

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TOKENS = torch.tensor([[1, 5, 3, 7]])


def llama(seed: int = 0, tied: bool = True) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=1, tie_word_embeddings=tied, initializer_range=0.2)
    return LlamaForCausalLM(config)


def save(model: torch.nn.Module, folder: Path) -> Path:
    with quiet():
        model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def adapted(folder: Path, **settings: object) -> PeftModel:
    """A live adapter of the tied model, saved."""
    with quiet():
        model = get_peft_model(llama(), LoraConfig(r=2, **settings))
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    made: torch.Tensor = model.eval()(input_ids=TOKENS).logits
    return made


def loaded(folder: Path) -> PreTrainedModel:
    with quiet():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model


def vectors(base: Path, expert: Path, workspace: Path | None = None) -> TaskVectors:
    return open_task_vectors(open_checkpoint(base), {"one": expert}, workspace=workspace)


def edit(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_an_adapter_of_one_side_is_refused_and_merged_into_an_untied_copy(
    tmp_path: Path, settings: dict[str, object]
) -> None:
    base, live = save(llama(), tmp_path / "base"), adapted(tmp_path / "one", **settings)
    with pytest.raises(ValueError, match="changes one of the tied parameters") as error:
        vectors(base, tmp_path / "one", tmp_path)
    assert f"trainmerge.untie('{base}', COPY)" in str(error.value)
    copy = tm.untie(base, tmp_path / "copy")
    assert torch.equal(logits(loaded(copy)), logits(loaded(base)))
    model, found = loaded(copy), vectors(copy, tmp_path / "one", tmp_path)
    parameters = dict(model.named_parameters())
    for name, delta in found.deltas.items():
        out = torch.empty_like(delta.base)
        delta.merge(out, torch.ones(1, 1))
        parameters[name].data = out
    assert torch.allclose(logits(model), logits(live), atol=1e-4)


def test_full_experts_of_both_kinds(tmp_path: Path) -> None:
    tied, own = save(llama(), tmp_path / "tied"), save(llama(1, tied=False), tmp_path / "own")
    with pytest.raises(ValueError, match=r"lm_head\.weight .* is untied, the base ties it") as error:
        vectors(tied, own)
    assert f"trainmerge.untie('{tied}', COPY)" in str(error.value)
    with pytest.raises(ValueError, match=r"untied in the base, the expert ties it") as error:
        vectors(own, tied)
    assert f"trainmerge.untie('{tied}', COPY)" in str(error.value)
    copy = tm.untie(tied, tmp_path / "copy")
    assert {HEAD, EMBEDDING} < vectors(copy, own).deltas.keys()
    assert {HEAD, EMBEDDING} < vectors(own, copy).deltas.keys()


def test_an_untied_expert_of_equal_sides_fits_a_tied_base(tmp_path: Path) -> None:
    tied = save(llama(), tmp_path / "tied")
    expert = tm.untie(save(llama(1), tmp_path / "expert"), tmp_path / "untied")
    assert EMBEDDING in vectors(tied, expert).deltas


def test_a_head_trained_apart_whose_configuration_still_ties_it(tmp_path: Path) -> None:
    base, one = save(llama(), tmp_path / "base"), save(llama(1), tmp_path / "one")
    tensors = load_file(one / "model.safetensors")
    save_file(tensors | {HEAD: tensors[EMBEDDING] + 0.1}, one / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"differ, config\.json ties them"):
        vectors(base, one)
    edit(one, tie_word_embeddings=False)
    delta = vectors(tm.untie(base, tmp_path / "copy"), one).deltas[HEAD]
    out = torch.empty_like(delta.base)
    delta.merge(out, torch.ones(1, 1))
    assert torch.equal(out, tensors[EMBEDDING] + 0.1)


@pytest.mark.parametrize("side", ["base", "one"])
def test_a_tie_that_the_configuration_lost(tmp_path: Path, side: str) -> None:
    """Setting the key alone leaves the head without a tensor."""
    base, one = save(llama(), tmp_path / "base"), save(llama(1), tmp_path / "one")
    edit(tmp_path / side, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=rf"{side}: the files lack lm_head\.weight") as error:
        vectors(base, one)
    assert f"trainmerge.untie('{tmp_path / side}', COPY)" in str(error.value)
    edit(tmp_path / side, tie_word_embeddings=True)
    vectors(base, one)


def test_masked_language_models_untie_bias_and_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2}
    base = save(BertForMaskedLM(BertConfig(**sizes, num_hidden_layers=1)), tmp_path / "base")
    (base / "vocab.txt").write_text("a\nb\n")
    copy = tm.untie(base, tmp_path / "copy")
    assert (copy / "vocab.txt").read_text() == "a\nb\n"
    names = open_checkpoint(copy).tensors
    assert {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"} < names.keys()


def test_what_cannot_be_untied_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    own = save(llama(tied=False), tmp_path / "own")
    with pytest.raises(ValueError, match="ties no parameters; use this folder"):
        tm.untie(own, tmp_path / "copy")
    sizes = {"vocab_size": 24, "d_model": 16, "d_kv": 8, "d_ff": 20, "num_heads": 2, "num_layers": 1}
    t5 = save(T5ForConditionalGeneration(T5Config(**sizes)), tmp_path / "t5")
    with pytest.raises(ValueError, match=r"ties .*shared|ties .*embed_tokens.* always"):
        tm.untie(t5, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
