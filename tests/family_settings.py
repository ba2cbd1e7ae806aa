"""Settings of tiny models of transformers' families, and one batch of inputs of each kind.

Legend: `B` examples, `T` tokens.
"""

import torch
from torch import Tensor

WORDS = 100  # in the vocabulary
PICTURE = 5  # a picture's token
B, T = 2, 9
ENCODER = {
    "vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
TEXT = {**ENCODER, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
OLD = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
SSM = {k: TEXT[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "pad_token_id")}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **ENDS}
VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 32, "patch_size": 8, "num_labels": 5,
}  # fmt: skip
T5 = {
    "vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
BART = {
    "vocab_size": WORDS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "max_position_embeddings": 64, "decoder_start_token_id": 2, **ENDS,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4,
}  # fmt: skip
SPEECH = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3],
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "pad_token_id": 0,
}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2]}
TOWER = {"hidden_size": 32, "num_heads": 4, "patch_size": 14, "depth": 2}
QWEN_VL = {
    "text_config": {**TEXT, "rope_parameters": ROPE}, "image_token_id": PICTURE, "video_token_id": 6,
    "vision_start_token_id": 7, "vision_end_token_id": 8,
}  # fmt: skip
MAMBA2 = {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2, "chunk_size": 8}
HYBRID = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
GEMMA3N = {
    **TEXT, "intermediate_size": [48, 48], "head_dim": 8, "sliding_window": 4, "laurel_rank": 4,
    "vocab_size_per_layer_input": WORDS, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.0, 0.0],
}  # fmt: skip
NEXT = {
    "head_dim": 8, "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
LLAMA4 = {
    "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "head_dim": 8,
    "interleave_moe_layer_step": 2,
}  # fmt: skip
MAMBA = {"state_size": 8, "time_step_rank": 16}
JAMBA = {
    "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8, "mamba_dt_rank": 16,
    "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
}  # fmt: skip
GRANITE_HYBRID = {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16}
RWKV = {
    "vocab_size": WORDS, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2,
    "intermediate_size": 48, "context_length": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DEBERTA = {
    "pooler_hidden_size": 32, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
}  # fmt: skip
DISTILBERT = {
    "vocab_size": WORDS, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
MOBILEBERT = {"embedding_size": 16, "intra_bottleneck_size": 32}
MODERNBERT = {
    "global_attn_every_n_layers": 2,
    "local_attention": 8,
    **ENDS,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
SWITCH = {
    "num_experts": 4, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1
}  # fmt: skip
WHISPER = {
    **BART, "num_mel_bins": 16, "max_source_positions": 30, "max_target_positions": 64,
    "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
AST = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": 40, "num_mel_bins": 16,
    "num_labels": 3,
}  # fmt: skip
SWIN = {
    "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2],
    "window_size": 4, "num_labels": 5,
}  # fmt: skip
CONVNEXT = {"num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1], "image_size": 32, "num_labels": 5}
CLIP = {
    "text_config": {**OLD, "projection_dim": 16}, "vision_config": {**VISION, "projection_dim": 16},
    "projection_dim": 16,
}  # fmt: skip
SIGLIP = {"text_config": OLD, "vision_config": VISION}
QWEN2_TOWER = {"embed_dim": 32, "mlp_ratio": 1, **TOWER}
QWEN25_TOWER = {
    **TOWER, "intermediate_size": 48, "out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 56
}  # fmt: skip
LLAVA = {
    "text_config": {"model_type": "llama", **TEXT}, "image_token_id": PICTURE, "image_seq_length": 16,
    "vision_config": {"model_type": "clip_vision_model", **VISION}, "vision_feature_layer": -1,
}  # fmt: skip
IDEFICS3 = {
    "text_config": {"model_type": "llama", **TEXT}, "vision_config": VISION, "image_token_id": PICTURE,
    "scale_factor": 2,
}  # fmt: skip
INTERNVL = {
    "text_config": {"model_type": "qwen2", **TEXT}, "image_token_id": PICTURE, "image_seq_length": 1,
    "vision_config": {**VISION, "image_size": [28, 28], "patch_size": [14, 14], "use_qk_norm": False},
}  # fmt: skip


def text() -> dict[str, Tensor]:
    ids = torch.randint(10, WORDS, (B, T), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, T - 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def unmasked() -> dict[str, Tensor]:
    return {"input_ids": text()["input_ids"]}


def pair() -> dict[str, Tensor]:
    return {**text(), "decoder_input_ids": text()["input_ids"][:, :4]}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def picture(size: int = 32) -> dict[str, Tensor]:
    return {"pixel_values": random(B, 3, size, size)}


def captioned(tokens: int, size: int = 32) -> dict[str, Tensor]:
    """A text that begins with a picture of so many tokens."""
    ids = torch.cat([torch.full((B, tokens), PICTURE), text()["input_ids"]], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **picture(size)}


def tiled(tokens: int) -> dict[str, Tensor]:
    """As `captioned`, with a dimension of tiles."""
    inputs = captioned(tokens)
    return {**inputs, "pixel_values": inputs["pixel_values"][:, None]}


def patches() -> dict[str, Tensor]:
    """Pictures of 2 x 2 and 2 x 4 patches, merged by fours: one token and two."""
    ids = torch.cat([torch.tensor([[PICTURE, 20, 21], [PICTURE, PICTURE, 22]]), text()["input_ids"]], 1)
    grid = torch.tensor([[1, 2, 2], [1, 2, 4]])
    of_picture = (ids == PICTURE).int()
    pixels = random(12, 3 * 2 * 14 * 14)
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels,
        "image_grid_thw": grid, "mm_token_type_ids": of_picture,
    }  # fmt: skip


def spectrogram() -> dict[str, Tensor]:
    return {"input_features": random(B, 16, 60), "decoder_input_ids": text()["input_ids"][:, :4]}


def patches_of_sound() -> dict[str, Tensor]:
    return {"input_values": random(B, 40, 16)}


def wave() -> dict[str, Tensor]:
    return {"input_values": random(B, 800)}
