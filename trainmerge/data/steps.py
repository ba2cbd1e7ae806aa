"""The order of the examples: a step's batches as a pure function of the seed and the step."""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch.utils.data import Dataset, Sampler

from trainmerge.data.batch import Batch, Step
from trainmerge.data.examples import Example
from trainmerge.data.tokenizer import Tokenizer


def step_indices(seed: int, expert: int, step: int, size: int, count: int) -> list[int]:
    """The `size` example indices of step `step` for an expert with `count` examples.

    Consecutive steps go through one permutation after another: every example is used once before any is
        reused, and batches continue across the border of two permutations.
    """
    positions = range(step * size, (step + 1) * size)
    return [_permutation(seed, expert, p // count, count)[p % count] for p in positions]


@lru_cache(maxsize=64)
def _permutation(seed: int, expert: int, epoch: int, count: int) -> list[int]:
    mixed = (seed * 1_000_003 + expert) * 1_000_003 + epoch
    generator = torch.Generator().manual_seed(mixed % 2**63)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


class Steps(Dataset[Step]):
    """Item t is this process's part of optimizer step t.

    A step's examples do not depend on the number of processes, which split them round-robin.
    """

    def __init__(
        self,
        examples: Sequence[Sequence[Example]],  # one list per expert
        tokenize: Tokenizer,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.examples, self.tokenize = examples, tokenize
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world_size = rank, world_size

    def __getitem__(self, step: int) -> Step:
        return [self._batch(expert, step) for expert in range(len(self.examples))]

    def _batch(self, expert: int, step: int) -> Batch:
        own = self.examples[expert]
        every = step_indices(self.seed, expert, step, self.batch_size, len(own))
        chosen = every[self.rank :: self.world_size]
        examples = [own[i] for i in chosen]
        encoded = self.tokenize.encode(examples)
        share = len(chosen) * self.world_size / self.batch_size
        rows = self.tokenize.rows(examples, encoded.inputs)
        return Batch(expert, encoded.inputs, encoded.mask, torch.tensor(chosen), share=share, rows=rows)


class FromStep(Sampler[int]):
    """Steps first .. last; its length is the whole run's, as Lightning expects."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.last))

    def __len__(self) -> int:
        return self.last
