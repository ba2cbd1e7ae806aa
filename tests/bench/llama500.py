"""A random Llama of 498 M bfloat16 parameters and three experts of it, made once and kept in the cache.

Base and experts lie in shards of 300 MB, as `save_pretrained` would leave them; 4 GB in all. Delete the
folder to have the room back.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.bench.suite_model import CACHE

FOLDER = CACHE / "bench" / "llama500"
LAYERS, HIDDEN, MIDDLE, VOCABULARY, EXPERTS = 21, 1280, 3456, 32000, 3
SHARD, MOVED = 300_000_000, 1e-3  # bytes of a shard; how far an expert is from the base


def experts() -> dict[str, Path]:
    """Expert -> its folder; made with the base, `FOLDER / "base"`, if they are not there."""
    folders = [FOLDER / "base", *(FOLDER / f"expert{k}" for k in range(EXPERTS))]
    for seed, folder in enumerate(folders):
        if not (folder / "config.json").is_file():  # written last
            folder.mkdir(parents=True, exist_ok=True)
            write_checkpoint(folder, seed)
    return {folder.name: folder for folder in folders[1:]}


def write_checkpoint(folder: Path, seed: int) -> None:
    """The configuration and random weights, written as they are drawn; `seed` 0 is the base."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trainmerge.system.safetensors_file import write_safetensors

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=MIDDLE, num_hidden_layers=LAYERS,
        num_attention_heads=20, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
    base, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)

    def weights(names: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in names.items():
            value = 0.02 * torch.randn(shape, generator=base).bfloat16().float()
            if seed:
                value += MOVED * torch.randn(shape, generator=own)
            yield name, value.bfloat16()

    parts = shards(shapes)
    homes = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        specs = {name: (torch.bfloat16, shape) for name, shape in part.items()}
        write_safetensors(folder / file, specs, weights(part), {"format": "pt"})
        homes |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    config.save_pretrained(folder)


def shards(shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    """The tensors in their order, cut where a shard is full."""
    import math

    parts: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        nbytes = 2 * math.prod(shape)
        if parts[-1] and size + nbytes > SHARD:
            parts.append({})
            size = 0
        parts[-1][name] = shape
        size += nbytes
    return parts
