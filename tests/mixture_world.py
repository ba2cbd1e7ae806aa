"""A tiny Qwen3-MoE and two fine-tunes whose routers are far apart, on disk, with texts of each."""

import json
from pathlib import Path

import torch

from tests.family_world import write_words
from tests.model_families import FAMILIES
from tests.world import nudge


def write_mixture(root: Path, name: str = "Qwen3-MoE", **changes: object) -> Path:
    """`base`, `a` and `b` with a tokenizer each, `NAME.jsonl` and `NAME-test.jsonl`."""
    family = FAMILIES[name]
    family = family._replace(settings={**family.settings, **changes})
    for number, place in enumerate(("base", "a", "b")):
        model = family.build()
        nudge(model, number, 0.02)
        dice = torch.Generator().manual_seed(number)
        for key, router in model.named_parameters():
            if key.endswith("mlp.gate.weight"):
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
