"""A tiny Qwen3-MoE and two fine-tunes whose routers are far apart, on disk, with texts of each."""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.family_world import write_words
from tests.model_families import FAMILIES
from tests.world import nudge

PICTURES = {
    "text_config": {
        "vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8,
        "num_key_value_heads": 1, "intermediate_size": 24, "moe_intermediate_size": 12, "num_experts": 4,
        "num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    },
    "vision_config": {
        "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    },
}  # fmt: skip


def write_mixture(root: Path, name: str = "Qwen3-MoE", **changes: object) -> Path:
    """`base`, `a` and `b` with a tokenizer each, `NAME.jsonl` and `NAME-test.jsonl`."""
    family = FAMILIES[name]
    family = family._replace(settings={**family.settings, **changes})
    for number, place in enumerate(("base", "a", "b")):
        model = family.build()
        nudge(model, number, 0.02)
        dice = torch.Generator().manual_seed(number)
        for key, router in model.named_parameters():
            if key.endswith(("gate.weight", "router.weight")):
                router.data += 0.5 * torch.randn(router.shape, generator=dice)
        model.save_pretrained(root / place)
        write_words(root / place)
        for file, seed in {f"{place}.jsonl": 7, f"{place}-test.jsonl": 11}.items():
            texts = [
                " ".join(f"w{10 + (seed * (i + 1) + (number + 3) * j) % 90}" for j in range(5 + i))
                for i in range(6)
            ]
            (root / file).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return root


def write_picture_mixture(root: Path, place: str, seed: int) -> torch.nn.Module:
    """A Qwen3-VL-MoE with its stacks transposed, as on the hub, and a tokenizer; returns the model."""
    torch.manual_seed(0)
    model = transformers.Qwen3VLMoeForConditionalGeneration(transformers.Qwen3VLMoeConfig(**PICTURES))
    nudge(model, seed)
    model.save_pretrained(root / place)
    file = root / place / "model.safetensors"
    tensors = {
        key: own.mT.contiguous() if ".experts." in key else own for key, own in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})
    write_words(root / place)
    return model
