"""Tiny sentence embedders on disk: BERT, mean pooling, a Dense layer with tanh, unit norm."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertModel

from tests.world import WORDS, bert, nudge, write_tokenizer
from trainmerge.run.recipe import Recipe
from trainmerge.run.recipe_tasks import Expert

D, E = 32, 16  # hidden size, width of the embedding
TANH = "torch.nn.modules.activation.Tanh"
KINDS = ("Transformer", "Pooling", "Dense", "Normalize")


def write_modules(folder: Path, kinds: Sequence[str] = KINDS, pooling: Mapping[str, Any] = {}) -> None:
    """modules.json and the configurations of pooling and Dense."""
    places = ["" if kind == "Transformer" else f"{i}_{kind}" for i, kind in enumerate(kinds)]
    entries = [
        {"idx": i, "name": str(i), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, place) in enumerate(zip(kinds, places, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    settings = {
        "Pooling": {"word_embedding_dimension": D, "pooling_mode_mean_tokens": True, **pooling},
        "Dense": {"in_features": D, "out_features": E, "bias": True, "activation_function": TANH},
        "LayerNorm": {"dimension": D},
    }
    for kind, place in zip(kinds, places, strict=True):
        if place:
            (folder / place).mkdir(exist_ok=True)
        if kind in settings:
            (folder / place / "config.json").write_text(json.dumps(settings[kind]))


def dense(seed: int) -> dict[str, Tensor]:
    """The weights of a Dense layer: the base's (seed 0), or those moved by training."""
    generator = torch.Generator().manual_seed(1000)
    layer = {"linear.weight": torch.randn(E, D, generator=generator) / 4, "linear.bias": torch.zeros(E)}
    moved = torch.Generator().manual_seed(seed)
    return {n: t + 0.1 * bool(seed) * torch.randn(t.shape, generator=moved) for n, t in layer.items()}


def write_embedder(folder: Path, seed: int, kinds: Sequence[str] = KINDS) -> BertModel:
    """The base (seed 0) or an expert of it."""
    model = bert()
    if seed:
        nudge(model, seed)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    write_modules(folder, kinds)
    if "Dense" in kinds:
        save_file(dense(seed), folder / f"{list(kinds).index('Dense')}_Dense/model.safetensors")
    return model.eval()


def write_embedders(root: Path, kinds: Sequence[str] = KINDS) -> Recipe:
    """A base and two experts, with texts of their own, and pairs to test on."""
    write_embedder(root / "base", 0, kinds)
    experts = {}
    for k, name in enumerate("ab"):
        write_embedder(root / name, k + 1, kinds)
        texts = [
            " ".join(WORDS[(i * 7 + j * (k + 2)) % len(WORDS)] for j in range(2 + i % 5)) for i in range(12)
        ]
        _write(root / f"{name}.jsonl", [{"text": text} for text in texts])
        pairs = [{"text": texts[i], "pair": texts[-1 - i]} for i in range(6)]
        _write(root / f"{name}-test.jsonl", pairs)
        experts[name] = Expert(
            str(root / name), str(root / f"{name}.jsonl"), str(root / f"{name}-test.jsonl")
        )
    return Recipe(str(root / "base"), experts)


def _write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def embed(model: nn.Module, layer: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    """The embedding of sentence-transformers, by its own formulas: [B, T] -> [B, E]."""
    states = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None].to(states.dtype)
    pooled = (states * mask).sum(1) / mask.sum(1).clamp_min(1e-9)
    rows = torch.tanh(pooled @ layer["linear.weight"].T + layer["linear.bias"])
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
