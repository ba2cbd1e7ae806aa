"""Random Llamas of real shapes, and experts near them that cost no memory of their own."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from trainmerge.kernels import ExpertWeight, Quantised, Term
from trainmerge.task_vectors.delta import Delta, TaskVectors

POOL = 1 << 28  # numbers that an expert's weights are cut from: more bytes than any cache holds
SIZES: dict[str, dict[str, object]] = {
    "135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "1.5B": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
    },
}  # fmt: skip
TINY: dict[str, object] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 50, "tie_word_embeddings": True,
}  # fmt: skip


def model(sizes: Mapping[str, object], device: torch.device) -> nn.Module:
    """A random Llama in bfloat16, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with device:
        return LlamaForCausalLM(LlamaConfig(**sizes, use_cache=False, dtype="bfloat16")).bfloat16().eval()


def experts(module: nn.Module, count: int, size: int = POOL, int8: bool = False) -> TaskVectors:
    """Base and `count` experts in host memory; expert k's weights are views of pool k.

    `int8`: matrices are of one byte a weight, as `Int8` leaves them.
    """
    largest = max(parameter.numel() for parameter in module.parameters())
    size = max(size, largest)
    pools = [torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02) for _ in range(1 + count)]

    def cut(pool: Tensor) -> Iterator[Tensor]:
        first = 0
        for parameter in module.parameters():
            first = 0 if first + parameter.numel() > size else first
            yield pool[first : first + parameter.numel()].view(parameter.shape)
            first += parameter.numel()

    def term(weight: Tensor) -> Term:
        if not int8 or weight.dim() < 2:
            return ExpertWeight(weight)
        codes = weight.view(-1).view(torch.int8)[: weight.numel()].view(weight.shape)
        return Quantised(codes, torch.full((len(codes),), 1e-5))

    names = [name for name, _ in module.named_parameters()]
    deltas = {
        name: Delta(base, tuple(term(weight) for weight in own))
        for name, base, *own in zip(names, *map(cut, pools), strict=True)
    }
    return TaskVectors(tuple(f"e{k}" for k in range(count)), deltas)
