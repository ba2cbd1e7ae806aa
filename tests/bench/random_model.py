"""Checkpoints of real names and shapes, with random numbers that repeat: written as fast as a disk is."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedConfig

from tests.world import WORDS, write_tokenizer
from trainmerge.system.safetensors_file import write_safetensors

POOL = 1 << 24  # random numbers that every weight is cut from


def write_checkpoint(folder: Path, config: PreTrainedConfig, seed: int) -> None:
    """Configuration, tokenizer and weights in the configuration's dtype; seeds from 1 are near seed 0."""
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    pool = 0.02 * torch.randn(POOL, generator=torch.Generator().manual_seed(0))
    if seed:
        pool += 1e-3 * torch.randn(POOL, generator=torch.Generator().manual_seed(seed))
    pool = pool.to(config.dtype)

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for i, (name, shape) in enumerate(shapes.items()):
            count, offset = shape.numel(), 7919 * i % (POOL // 2)
            numbers = pool[offset : offset + count]
            if len(numbers) < count:
                numbers = pool.repeat(-(-count // POOL))[:count]
            yield name, numbers.view(shape) if len(shape) > 1 else numbers.abs() + 0.5

    specs = {name: (config.dtype, tuple(shape)) for name, shape in shapes.items()}
    write_safetensors(folder / "model.safetensors", specs, weights(), {"format": "pt"})
    write_tokenizer(folder)


def write_family(folder: Path, config: PreTrainedConfig, experts: int, tokens: int) -> None:
    """`base`, `e1` .. and `texts.jsonl`, examples of so many tokens."""
    for k in range(experts + 1):
        write_checkpoint(folder / (f"e{k}" if k else "base"), config, k)
    texts = [" ".join(WORDS[(i * 7 + j) % len(WORDS)] for i in range(tokens)) for j in range(8)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
