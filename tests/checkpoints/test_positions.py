"""The tokens that a model has positions for, against the model itself: one more is torch's error."""

import pytest
import torch
import transformers
from torch import nn

from trainmerge.checkpoints.positions import Positions, positions_of

MOST, WORDS = 12, 20
BERT = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
    "max_position_embeddings": MOST,
}  # fmt: skip
GPT = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": MOST}
BART = {
    "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": MOST,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "decoder_start_token_id": 1,
    "forced_eos_token_id": 1,
}  # fmt: skip
OPT = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 8,
    "word_embed_proj_dim": 8, "max_position_embeddings": MOST,
}  # fmt: skip
NEO = {
    "hidden_size": 8, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]],
    "max_position_embeddings": MOST,
}  # fmt: skip
ENDING = {
    "BertForMaskedLM": (BERT, MOST),
    "ElectraForMaskedLM": ({**BERT, "embedding_size": 8}, MOST),
    "DistilBertForMaskedLM": (
        {"dim": 8, "hidden_dim": 8, "n_layers": 1, "n_heads": 2, "max_position_embeddings": MOST},
        MOST,
    ),
    "RobertaForMaskedLM": ({**BERT, "pad_token_id": 1}, MOST - 2),
    "XLMRobertaForSequenceClassification": ({**BERT, "pad_token_id": 1}, MOST - 2),
    "CamembertForCausalLM": ({**BERT, "pad_token_id": 0}, MOST - 1),
    "MPNetForMaskedLM": ({**BERT, "pad_token_id": 1}, MOST - 2),
    "GPT2LMHeadModel": (GPT, MOST),
    "OpenAIGPTLMHeadModel": (GPT, MOST),
    "GPTNeoForCausalLM": (NEO, MOST),
    "OPTForCausalLM": (OPT, MOST),
    "BartForConditionalGeneration": (BART, MOST),
    "MarianMTModel": ({**BART, "decoder_vocab_size": WORDS}, MOST),
    "MptForCausalLM": ({"d_model": 8, "n_layers": 1, "n_heads": 2, "max_seq_len": MOST}, MOST),
}


def model(name: str, settings: dict[str, object]) -> nn.Module:
    kind = getattr(transformers, name)
    made: nn.Module = kind(kind.config_class(vocab_size=WORDS, **settings)).eval()
    return made


@pytest.mark.parametrize("name", ENDING)
def test_one_token_more_has_no_position(name: str) -> None:
    settings, most = ENDING[name]
    built = model(name, settings)
    found = positions_of(type(built), built.config)
    assert found.text == most
    assert found.target == (most if built.config.is_encoder_decoder else None)
    target = {"decoder_input_ids": torch.full((1, 1), 5)} if built.config.is_encoder_decoder else {}
    with torch.no_grad():
        built(input_ids=torch.full((1, most), 5), **target)
        with pytest.raises((IndexError, RuntimeError)):
            built(input_ids=torch.full((1, most + 1), 5), **target)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("T5ForConditionalGeneration", {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}),
        ("BloomForCausalLM", {"hidden_size": 8, "n_layer": 1, "n_head": 2}),
        ("RwkvForCausalLM", {"hidden_size": 8, "num_hidden_layers": 2, "context_length": MOST}),
    ],
)
def test_models_without_a_limit(name: str, settings: dict[str, object]) -> None:
    built = model(name, settings)
    assert positions_of(type(built), built.config) == Positions()


def test_rotary_positions_end_where_training_did() -> None:
    built = model("LlamaForCausalLM", BERT)
    assert positions_of(type(built), built.config) == Positions(MOST)
