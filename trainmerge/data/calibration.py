"""Unlabeled examples -> one batch per expert and step.

The data order is a pure function of (seed, step). So the step number is all that is needed to resume, also
mid-epoch, with a different number of workers or processes.
"""

import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from trainmerge.data.batch import Batch, Step
from trainmerge.data.examples import (
    Columns,
    Example,
    contents,
    examples_identity,
    read_examples,
    subject,
    warn_of_overlap,
)
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.system.ranges import check_option
from trainmerge.system.workspace import VOCABULARY


def recorded(tokenizer: str) -> str:
    """The tokenizer as a run records it: a folder that was made for it by its name, which is a digest."""
    name = Path(tokenizer).name
    return name if name.startswith(VOCABULARY) else tokenizer


def sample(seed: int, expert: int, step: int, size: int, count: int) -> list[int]:
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
        chosen = sample(self.seed, expert, step, self.batch_size, len(own))[self.rank :: self.world_size]
        examples = [own[i] for i in chosen]
        encoded = self.tokenize.encode(examples)
        share = len(chosen) * self.world_size / self.batch_size
        rows = self.tokenize.rows(examples, encoded.inputs)
        return Batch(expert, encoded.inputs, encoded.mask, torch.tensor(chosen), share=share, rows=rows)


class _FromStep(Sampler[int]):
    """Steps first .. last; its length is the whole run's, as Lightning expects."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.last))

    def __len__(self) -> int:
        return self.last


class Calibration(pl.LightningDataModule):
    """One stream of unlabeled examples per expert; a step has `batch_size` of each.

    Args:
        files: Expert -> file of its unlabeled examples.
        tokenizer: Folder of the merge's tokenizer: the base, or `Recipe.tokenizer_folder`.
        test_files: Expert -> file of its test examples, to warn when the two overlap.
        batch_size: Examples per expert and step, over all processes.
        max_length: Texts are truncated to this many tokens.
        columns: The columns of text, chat, spans, decoder's target, picture and sound.
        max_examples: Use the first so many examples of each expert; by default all.
        seed: The data order is a function of this and the step.
        num_workers: Processes that tokenise ahead.
    """

    def __init__(
        self,
        files: Mapping[str, str],
        tokenizer: str,
        test_files: Mapping[str, str] | None = None,
        batch_size: int = 16,
        max_length: int = 256,
        columns: Columns = Columns(),  # noqa: B008 - frozen
        max_examples: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_option("data.batch_size", batch_size, int, "[1, 1e6]")
        check_option("data.max_length", max_length, int, f"[1, {sys.maxsize}]")
        check_option("data.max_examples", max_examples, int | None, "[1, inf)")
        check_option("data.seed", seed, int, "[0, inf)")
        check_option("data.num_workers", num_workers, int, "[0, inf)")
        self.files, self.test_files = dict(files), dict(test_files or {})
        self.batch_size, self.columns = batch_size, columns
        self.seed, self.num_workers = seed, num_workers
        self.tokenizer, self.max_length, self.max_examples = tokenizer, max_length, max_examples
        self.examples = [
            read_examples(file, columns, self._render, max_examples) for file in self.files.values()
        ]
        for name, examples in zip(self.files, self.examples, strict=True):
            if len(examples) == 1:
                warnings.warn(
                    f"{name}: only one calibration example; the merge will overfit it", stacklevel=2
                )
            if name in self.test_files:
                test = read_examples(self.test_files[name], columns.plain(), self._render, located=False)
                warn_of_overlap(name, [subject(e) for e in examples], [subject(e) for e in test])
        self._consumed = 0

    @cached_property
    def tokenize(self) -> Tokenizer:
        """The merge's tokenizer, loaded on first use."""
        return Tokenizer(self.tokenizer, self.max_length)

    def _render(self, chat: Sequence[Mapping[str, str]]) -> Example:
        return self.tokenize.render(chat)

    def identities(self) -> dict[str, str]:
        """Expert -> SHA-256 of its examples, computed once."""
        return dict(self._identities)

    @cached_property
    def _identities(self) -> dict[str, str]:
        texts = (json.dumps([contents(e) for e in own]).encode() for own in self.examples)
        return {name: sha256(text).hexdigest() for name, text in zip(self.files, texts, strict=True)}

    def settings(self) -> dict[str, Any]:
        """The settings that the batches depend on, which a resumed run must share."""
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "tokenizer": recorded(self.tokenizer),
            "max_length": self.max_length,
            "columns": self.columns.record(),
            "max_examples": self.max_examples,
        }

    def identity(self) -> str:
        """A text that identifies examples and settings."""
        return examples_identity(self.identities(), self.settings())

    def state_dict(self) -> dict[str, Any]:
        """The run's progress: one number, the same on every process."""
        return {"consumed": self.trainer.global_step if self.trainer else self._consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last consumed step."""
        self._consumed = state["consumed"]

    def train_dataloader(self) -> DataLoader[Step]:
        """The remaining steps of the run, one item each."""
        trainer = self.trainer
        assert trainer is not None
        steps = Steps(
            self.examples, self.tokenize, self.batch_size, self.seed, trainer.global_rank, trainer.world_size
        )
        sampler = _FromStep(self._consumed, trainer.max_steps)
        return DataLoader(steps, batch_size=None, sampler=sampler, num_workers=self.num_workers)
