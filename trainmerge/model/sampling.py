"""Tokens that a model writes: every row has its own seed, so that a row does not depend on its batch.

Legend: `B` rows, `T` tokens, `V` vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from typing_extensions import override

from trainmerge.system.workspace import digest

ROWS = 32  # written together


class Gumbel(LogitsProcessor):
    """Adds Gumbel noise to logits / temperature: the largest is then a sample of their softmax.

    Args:
        seeds: Of the rows' noise, B.
        temperature: Of the softmax.
    """

    def __init__(self, seeds: Sequence[int], temperature: float) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature = temperature

    @override
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] -> [B, V], float32."""
        rows = [torch.empty(scores.shape[-1]).exponential_(generator=own) for own in self.generators]
        noise = -torch.stack(rows).clamp_min(torch.finfo(torch.float32).tiny).log()
        return scores.float() / self.temperature + noise.to(scores.device)


@torch.no_grad()
def sample_tokens(
    module: nn.Module,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    length: int,
    ends: Collection[int],
    padding: int,
    temperature: float = 1.0,
) -> list[list[int]]:
    """What the model writes after each prompt: up to `length` tokens, with the first of `ends` if it comes.

    Args:
        module: A causal language model of transformers, in evaluation mode.
        prompts: Their tokens; none is empty.
        seeds: One per prompt.
        length: Most tokens to write.
        ends: Tokens that end a text.
        padding: The padding token.
        temperature: Of the softmax that is sampled from.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    written: dict[int, list[int]] = {}
    with _plain_generation(module):
        for first in range(0, len(order), ROWS):
            rows = order[first : first + ROWS]
            noise = Gumbel([seeds[i] for i in rows], temperature)
            found = _write(module, [prompts[i] for i in rows], noise, length, ends, padding)
            written |= dict(zip(rows, found, strict=True))
    return [written[i] for i in range(len(prompts))]


def _write(
    module: Any,
    prompts: Sequence[Sequence[int]],
    noise: Gumbel,
    length: int,
    ends: Collection[int],
    padding: int,
) -> list[list[int]]:
    longest = max(map(len, prompts))
    device = next(module.parameters()).device
    ids = torch.tensor([[padding] * (longest - len(row)) + [*row] for row in prompts], device=device)
    real = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=device)
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=length, do_sample=False, pad_token_id=padding, eos_token_id=sorted(ends) or None
    )
    whole = module.generate(
        inputs=ids,
        attention_mask=real,
        generation_config=settings,
        logits_processor=LogitsProcessorList([noise]),
    )
    return [upto(row[longest:], ends) for row in whole.tolist()]


def seed_of(text: str) -> int:
    """The seed of a row that this text names."""
    return int(digest(text, 15), 16)


def upto(tokens: Sequence[int], ends: Collection[int]) -> list[int]:
    """The tokens with the first end, and nothing after it.

    >>> upto([5, 7, 2, 0, 0], {2}), upto([5, 7], {2})
    ([5, 7, 2], [5, 7])
    """
    at = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[: at + 1])


@contextmanager
def _plain_generation(module: Any) -> Iterator[None]:
    """Without the checkpoint's own penalties, filters and lengths, which would change the distribution."""
    own = module.generation_config
    module.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        module.generation_config = own
