"""Tiny folders in diffusers' layout, made here: a pipeline with a U-Net, a DiT, and LoRAs of skills."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
UNET = {
    "conv_in.weight": (8, 4, 3, 3), "conv_in.bias": (8,), "time_embedding.linear_1.weight": (12, 8),
    f"{BLOCK}.attn1.to_q.weight": (8, 8), f"{BLOCK}.attn1.to_k.weight": (8, 8),
    f"{BLOCK}.attn1.to_out.0.weight": (8, 8), f"{BLOCK}.attn1.to_out.0.bias": (8,),
    "down_blocks.0.attentions.0.proj_in.weight": (8, 8, 1, 1), "mid_block.resnets.0.norm1.weight": (8,),
    "conv_out.weight": (4, 8, 3, 3),
}  # fmt: skip
DIT = {
    "pos_embed.proj.weight": (8, 2, 2, 2), "transformer_blocks.0.norm1.linear.weight": (48, 8),
    "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight": (6, 8),
    "transformer_blocks.0.attn1.to_q.weight": (8, 8), "transformer_blocks.0.attn1.to_q.bias": (8,),
    "transformer_blocks.0.ff.net.2.weight": (8, 32), "proj_out_2.weight": (16, 8),
}  # fmt: skip
CLIP = {
    "text_model.embeddings.token_embedding.weight": (20, 8),
    "text_model.embeddings.position_ids": (1, 8),
    "text_model.encoder.layers.0.self_attn.q_proj.weight": (8, 8),
    "text_model.encoder.layers.0.mlp.fc1.weight": (16, 8),
}
VAE = {"encoder.conv_in.weight": (4, 3, 3, 3), "quant_conv.bias": (8,)}
Q, OUT, CONV = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_out.0", "conv_in"
FC, TEXT_Q = "text_model.encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.self_attn.q_proj"


def weights(
    shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    if (ids := "text_model.embeddings.position_ids") in made:
        made[ids] = torch.arange(8)[None]
    return made


def component(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, object]) -> Path:
    """One component's folder."""
    folder.mkdir(parents=True)
    stem = "diffusion_pytorch_model" if "_class_name" in config else "model"
    save_file(dict(state), folder / f"{stem}.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def pipeline(
    folder: Path, seed: int, changed: tuple[str, ...] = ("unet",), prediction: str = "epsilon"
) -> Path:
    """A pipeline whose `changed` components have the weights of `seed`, the others those of seed 0."""
    parts: dict[str, tuple[Mapping[str, tuple[int, ...]], dict[str, object]]] = {
        "unet": (UNET, {"_class_name": "UNet2DConditionModel", "act_fn": "silu", "sample_size": 8}),
        "text_encoder": (CLIP, {"model_type": "clip_text_model", "hidden_act": "quick_gelu"}),
        "vae": (VAE, {"_class_name": "AutoencoderKL", "latent_channels": 4}),
    }
    index: dict[str, object] = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    for name, (shapes, config) in parts.items():
        own = seed if name in changed else 0
        component(folder / name, weights(shapes, own), config)
        index[name] = ["transformers" if name == "text_encoder" else "diffusers", "Some"]
    index |= {"scheduler": ["diffusers", "DDIMScheduler"], "safety_checker": [None, None]}
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({"prediction_type": prediction}))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def factors(layer: str, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """up and down of a LoRA of a layer of U-Net or text encoder, convolutions' with their kernels."""
    shape = {**UNET, **CLIP}[f"{layer}.weight"]
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator)
    return up, torch.randn(rank, *shape[1:], generator=generator)


def product(layer: str, rank: int, seed: int, scale: float) -> Tensor:
    """The change that such a LoRA makes, float64."""
    up, down = (part.double().flatten(1) for part in factors(layer, rank, seed))
    return (scale * up @ down).view({**UNET, **CLIP}[f"{layer}.weight"])
