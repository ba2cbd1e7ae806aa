"""Further tiny models: encoders, classifiers and other heads, pictures, and vision-language models."""

from typing import Any

from tests.family_settings import (
    BART,
    CLIP,
    DEBERTA,
    DISTILBERT,
    ENCODER,
    MODERNBERT,
    NEXT,
    OLD,
    PICTURE,
    QWEN_VL,
    ROPE,
    T5,
    TEXT,
    TOWER,
    VISION,
    WORDS,
    captioned,
    pair,
    patches,
    picture,
    text,
    tiled,
)
from tests.model_families import Family, causal

ENCODERS: dict[str, dict[str, Any]] = {
    "Bert": {},
    "Roberta": {},
    "XLMRoberta": {},
    "DebertaV2": DEBERTA,
    "Electra": {"embedding_size": 16},
    "Albert": {"embedding_size": 16},
    "ModernBert": MODERNBERT,
}
QWEN3_TOWER = {
    **TOWER, "intermediate_size": 48, "out_hidden_size": 32, "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
}  # fmt: skip
QWEN3_ROPE = {"rope_parameters": {**ROPE, "mrope_interleaved": True}, "head_dim": 8}
QWEN3_VL = {**QWEN_VL, "text_config": {**TEXT, **QWEN3_ROPE}, "vision_config": QWEN3_TOWER}
GEMMA = {"model_type": "gemma", **TEXT, "head_dim": 8}
GEMMA4 = {
    **TEXT, "head_dim": 8, "global_head_dim": 8, "sliding_window": 4, "vocab_size_per_layer_input": WORDS,
    "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
}  # fmt: skip
GEMMA3_VL = {
    "text_config": {**TEXT, "head_dim": 8}, "vision_config": {**VISION, "vision_use_head": False},
    "mm_tokens_per_image": 4, "image_token_id": PICTURE, "boi_token_index": 7, "eoi_token_index": 8,
}  # fmt: skip
QFORMER = {k: v for k, v in ENCODER.items() if k != "pad_token_id"} | {"encoder_hidden_size": 32}
BLIP2 = {
    "vision_config": VISION, "qformer_config": QFORMER, "num_query_tokens": 4, "image_token_id": PICTURE,
    "text_config": {"model_type": "opt", **OLD, "word_embed_proj_dim": 32, "ffn_dim": 48},
}  # fmt: skip
SEGFORMER = {
    "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
    "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
    "decoder_hidden_size": 16, "num_labels": 3,
}  # fmt: skip
NEMOTRON = {
    "vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "hybrid_override_pattern": "M*",
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48,
    "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DBRX = {
    "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": WORDS,
    "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
}  # fmt: skip
XLNET = {"vocab_size": WORDS, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
RESNET = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 5}
YOLOS = {**VISION, "image_size": [32, 32], "num_detection_tokens": 4}
LINEAR = {k: v for k, v in NEXT.items() if k != "shared_expert_intermediate_size"}

TASK_FAMILIES: dict[str, Family] = {
    **{f"{name} encoder": Family(f"{name}Model", {**ENCODER, **more}, text)
       for name, more in ENCODERS.items()},
    **{f"{name} classifier": Family(f"{name}ForSequenceClassification",
                                    {**ENCODER, **more, "num_labels": 3}, text)
       for name, more in ENCODERS.items() if name != "Bert"},
    "DistilBERT classifier": Family("DistilBertForSequenceClassification", DISTILBERT, text),
    "XLM-RoBERTa": Family("XLMRobertaForMaskedLM", ENCODER, text),
    "BERT token classifier": Family("BertForTokenClassification", {**ENCODER, "num_labels": 5}, text),
    "BERT questions": Family("BertForQuestionAnswering", ENCODER, text),
    "BERT pretraining": Family("BertForPreTraining", ENCODER, text),
    "BERT choices": Family(
        "BertForMultipleChoice", ENCODER,
        lambda: {name: value[:, None].repeat(1, 2, 1) for name, value in text().items()},
    ),
    "Llama classifier": Family("LlamaForSequenceClassification", {**TEXT, "num_labels": 3}, text),
    "Qwen2 reward model": Family("Qwen2ForSequenceClassification", {**TEXT, "num_labels": 1}, text),
    "Llama token classifier": Family("LlamaForTokenClassification", {**TEXT, "num_labels": 5}, text),
    "M2M-100": Family("M2M100ForConditionalGeneration", BART, pair),
    "LongT5": Family("LongT5ForConditionalGeneration", T5, pair),
    "XLNet": Family("XLNetLMHeadModel", XLNET, text),
    "ERNIE 4.5": causal("Ernie4_5"),
    "Qwen3.5": Family("Qwen3_5ForCausalLM", {**TEXT, **LINEAR}, text),
    "Gemma 4": Family("Gemma4ForCausalLM", GEMMA4, text),
    "Nemotron-H": causal("NemotronH", NEMOTRON),
    "DBRX": causal("Dbrx", DBRX),
    "DeiT": Family("DeiTForImageClassification", VISION, picture),
    "BEiT": Family("BeitForImageClassification", VISION, picture),
    "DINOv2 backbone": Family("Dinov2Model", VISION, picture),
    "ResNet": Family("ResNetForImageClassification", RESNET, picture),
    "YOLOS": Family("YolosForObjectDetection", YOLOS, picture),
    "SegFormer": Family("SegformerForSemanticSegmentation", SEGFORMER, picture),
    "CLIP vision": Family("CLIPVisionModelWithProjection", {**VISION, "projection_dim": 16}, picture),
    "CLIP text": Family("CLIPTextModel", CLIP["text_config"], text),
    "Qwen3-VL": Family("Qwen3VLForConditionalGeneration", QWEN3_VL, patches),
    "Gemma 3 vision": Family("Gemma3ForConditionalGeneration", GEMMA3_VL, lambda: captioned(4)),
    "PaliGemma": Family(
        "PaliGemmaForConditionalGeneration",
        {"text_config": GEMMA, "vision_config": {"model_type": "siglip_vision_model", **VISION},
         "image_token_id": PICTURE, "projection_dim": 32},
        lambda: captioned(16),
    ),
    "SmolVLM": Family(
        "SmolVLMForConditionalGeneration",
        {"text_config": {"model_type": "llama", **TEXT}, "vision_config": VISION,
         "image_token_id": PICTURE, "scale_factor": 2},
        lambda: tiled(4),
    ),
    "BLIP-2": Family("Blip2ForConditionalGeneration", BLIP2, lambda: captioned(4)),
}  # fmt: skip
