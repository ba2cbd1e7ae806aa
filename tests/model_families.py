"""Tiny random models of families of transformers: a class, its configuration and one batch of inputs.

Legend: `B` examples, `T` tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from tests.family_settings import (
    AST,
    BART,
    CLIP,
    CONVNEXT,
    DEBERTA,
    DEEPSEEK,
    DISTILBERT,
    ENCODER,
    ENDS,
    EXPERTS,
    GEMMA3N,
    GPT,
    GRANITE_HYBRID,
    HYBRID,
    IDEFICS3,
    INTERNVL,
    JAMBA,
    LLAMA4,
    LLAVA,
    LOCAL,
    MAMBA,
    MAMBA2,
    MOBILEBERT,
    MODERNBERT,
    NEXT,
    OLD,
    QWEN2_TOWER,
    QWEN25_TOWER,
    QWEN_VL,
    RWKV,
    SIGLIP,
    SPEECH,
    SSM,
    SWIN,
    SWITCH,
    T5,
    TEXT,
    VISION,
    WHISPER,
    WORDS,
    captioned,
    pair,
    patches,
    patches_of_sound,
    picture,
    spectrogram,
    text,
    tiled,
    unmasked,
    wave,
)
from trainmerge.checkpoints.meta_model import _for_learning


class Family(NamedTuple):
    """A model's class, its configuration's arguments, and its inputs by name."""

    kind: str
    settings: Mapping[str, Any]
    inputs: Callable[[], dict[str, Tensor]]

    def build(self) -> nn.Module:
        """A random model, in evaluation mode; without dropout and cache, as a fit loads it."""
        torch.manual_seed(0)
        cls = getattr(transformers, self.kind)
        config = cls.config_class(**self.settings)
        _for_learning(config)
        model: nn.Module = cls(config)
        return model.eval()


def causal(name: str, base: Mapping[str, Any] = TEXT, **settings: Any) -> Family:
    return Family(f"{name}ForCausalLM", {**base, **settings}, text)


FAMILIES: dict[str, Family] = {
    "Llama": causal("Llama", tie_word_embeddings=True),
    "Mistral": causal("Mistral", sliding_window=4),
    "Qwen2": causal("Qwen2", tie_word_embeddings=True),
    "Qwen3": causal("Qwen3", head_dim=8),
    "Gemma": causal("Gemma", head_dim=8),
    "Gemma 2": causal("Gemma2", head_dim=8, sliding_window=4),
    "Gemma 3": Family("Gemma3ForCausalLM", {**TEXT, "head_dim": 8, "sliding_window": 4}, text),
    "Phi": causal("Phi"),
    "Phi-3": causal("Phi3"),
    "StableLM": causal("StableLm"),
    "OLMo": causal("Olmo"),
    "OLMo clip_qkv": causal("Olmo", clip_qkv=0.05),
    "OLMo 2": causal("Olmo2"),
    "OLMo 3": causal("Olmo3"),
    "Granite": causal("Granite"),
    "Cohere": causal("Cohere"),
    "Cohere 2": causal("Cohere2"),
    "SmolLM3": causal("SmolLM3"),
    "StarCoder2": causal("Starcoder2"),
    "Nemotron": causal("Nemotron"),
    "GLM-4": causal("Glm4", head_dim=8),
    "EXAONE 4": causal("Exaone4"),
    "Ministral": causal("Ministral", head_dim=8, sliding_window=4),
    "GPT-2": Family("GPT2LMHeadModel", GPT, text),
    "GPT-J": causal("GPTJ", GPT, rotary_dim=4),
    "GPT-NeoX": causal("GPTNeoX", OLD),
    "GPT-BigCode": causal("GPTBigCode", GPT),
    "OPT": causal("OPT", OLD, word_embed_proj_dim=32, ffn_dim=48),
    "BLOOM": causal("Bloom", ENDS, vocab_size=WORDS, hidden_size=32, n_layer=2, n_head=4),
    "Falcon": causal(
        "Falcon", ENDS, vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    "MPT": causal("Mpt", {}, vocab_size=WORDS, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "Gemma 3n": Family("Gemma3nForCausalLM", GEMMA3N, text),
    "Mixtral": causal("Mixtral", **LOCAL),
    "Qwen2-MoE": causal("Qwen2Moe", **EXPERTS, shared_expert_intermediate_size=24),
    "Qwen3-MoE": causal("Qwen3Moe", **EXPERTS, head_dim=8),
    "Qwen3-Next": causal("Qwen3Next", **EXPERTS, **NEXT),
    "DeepSeek-V2": causal("DeepseekV2", **DEEPSEEK),
    "DeepSeek-V3": causal("DeepseekV3", **DEEPSEEK),
    "OLMoE clip_qkv": causal("Olmoe", num_experts=4, num_experts_per_tok=2, clip_qkv=0.05),
    "Granite-MoE": causal("GraniteMoe", **LOCAL),
    "gpt-oss": causal("GptOss", **LOCAL, head_dim=8, sliding_window=4),
    "Llama 4": causal("Llama4", **LLAMA4),
    "PhiMoE": causal("Phimoe", **LOCAL),
    "GLM-4-MoE": causal("Glm4Moe", **{**DEEPSEEK, "n_group": 1, "num_key_value_heads": 2}, head_dim=8),
    "Mamba": Family("MambaForCausalLM", {**SSM, **MAMBA}, unmasked),
    "FalconMamba": Family("FalconMambaForCausalLM", {**SSM, **MAMBA}, unmasked),
    "Mamba 2": Family("Mamba2ForCausalLM", {**SSM, **MAMBA2}, unmasked),
    "Jamba": causal("Jamba", **JAMBA),
    "Bamba": causal("Bamba", **HYBRID, mamba_expand=2, attn_layer_indices=[1]),
    "Granite-MoE hybrid": causal("GraniteMoeHybrid", **LOCAL, **HYBRID, mamba_expand=2, **GRANITE_HYBRID),
    "Falcon-H1": causal("FalconH1", **HYBRID, head_dim=8, mamba_d_ssm=64),
    "RWKV": Family("RwkvForCausalLM", RWKV, unmasked),
    "RecurrentGemma": causal(
        "RecurrentGemma", OLD, num_hidden_layers=3, lru_width=32, attention_window_size=8
    ),
    "LFM2": causal("Lfm2", layer_types=["conv", "full_attention"]),
    "BERT": Family("BertForMaskedLM", ENCODER, text),
    "BERT classifier": Family("BertForSequenceClassification", {**ENCODER, "num_labels": 3}, text),
    "RoBERTa": Family("RobertaForMaskedLM", ENCODER, text),
    "DeBERTa-v2": Family("DebertaV2ForMaskedLM", {**ENCODER, **DEBERTA}, text),
    "ELECTRA": Family("ElectraForMaskedLM", {**ENCODER, "embedding_size": 16}, text),
    "ALBERT": Family("AlbertForMaskedLM", {**ENCODER, "embedding_size": 16}, text),
    "DistilBERT": Family("DistilBertForMaskedLM", DISTILBERT, text),
    "MobileBERT": Family("MobileBertForMaskedLM", {**ENCODER, **MOBILEBERT}, text),
    "ModernBERT": Family("ModernBertForMaskedLM", {**ENCODER, **MODERNBERT}, text),
    "T5": Family("T5ForConditionalGeneration", T5, pair),
    "mT5": Family("MT5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}, pair),
    "Switch": Family("SwitchTransformersForConditionalGeneration", {**T5, **SWITCH}, pair),
    "BART": Family("BartForConditionalGeneration", BART, pair),
    "mBART": Family("MBartForConditionalGeneration", BART, pair),
    "Pegasus": Family("PegasusForConditionalGeneration", BART, pair),
    "Marian": Family("MarianMTModel", {**BART, "decoder_vocab_size": WORDS}, pair),
    "Whisper": Family("WhisperForConditionalGeneration", WHISPER, spectrogram),
    "Wav2Vec2": Family("Wav2Vec2ForCTC", SPEECH, wave),
    "HuBERT": Family("HubertForSequenceClassification", {**SPEECH, "classifier_proj_size": 16}, wave),
    "ViT": Family("ViTForImageClassification", VISION, picture),
    "DINOv2": Family("Dinov2ForImageClassification", VISION, picture),
    "DINOv2 SwiGLU": Family("Dinov2ForImageClassification", {**VISION, "use_swiglu_ffn": True}, picture),
    "Wav2Vec2 classifier": Family(
        "Wav2Vec2ForSequenceClassification", {**SPEECH, "classifier_proj_size": 16}, wave
    ),
    "AST": Family("ASTForAudioClassification", AST, patches_of_sound),
    "Swin": Family("SwinForImageClassification", SWIN, picture),
    "ConvNeXt": Family("ConvNextForImageClassification", CONVNEXT, picture),
    "CLIP": Family("CLIPModel", CLIP, lambda: {**text(), **picture()}),
    "SigLIP": Family("SiglipModel", SIGLIP, lambda: {**text(), **picture()}),
    "Qwen2-VL": Family("Qwen2VLForConditionalGeneration", {**QWEN_VL, "vision_config": QWEN2_TOWER}, patches),
    "Qwen2.5-VL": Family(
        "Qwen2_5_VLForConditionalGeneration", {**QWEN_VL, "vision_config": QWEN25_TOWER}, patches
    ),
    "LLaVA": Family("LlavaForConditionalGeneration", LLAVA, lambda: captioned(16)),
    "Idefics3": Family("Idefics3ForConditionalGeneration", IDEFICS3, lambda: tiled(4)),
    "InternVL": Family("InternVLForConditionalGeneration", INTERNVL, lambda: captioned(1, 28)),
}
