"""Unlabeled examples -> one batch per expert and step.

The data order is a pure function of (seed, step): nothing but the step number has to be saved to
resume, mid-epoch too, with other workers or another number of processes.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import AutoTokenizer

from trainmerge.batch import Batch, Step

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


class Tokenizer:
    """Texts -> padded model inputs, with the base's own tokenizer."""

    def __init__(self, path: str, max_length: int) -> None:
        if not Path(path).is_dir():
            raise ValueError(
                f"{path}: not a folder. Name the base's checkpoint folder; its tokenizer is used."
            )
        self.max_length = max_length
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: no tokenizer that transformers can load in it ({error})") from error
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token  # padding is masked; any token will do

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Inputs [B, T], cut at `max_length` and padded to the longest text."""
        encoded = self._tokenizer(
            list(texts), truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
        )
        return dict(encoded)


def load_examples(path: str, columns: Sequence[str]) -> datasets.Dataset:
    """A JSONL, CSV, parquet or text file, or a dataset saved with `save_to_disk`, as these columns.

    Raises:
        ValueError: no such file, unknown format, unreadable, no examples, a column that is not there, or
            a `text` that is none.
    """
    data = _read(Path(path))
    absent = [column for column in columns if column not in data.column_names]
    if absent:
        raise ValueError(f"{path}: no column {absent}; it has {data.column_names}")
    if not len(data):
        raise ValueError(f"{path}: no examples in it")
    for i, text in enumerate(data[columns[0]]):
        if not isinstance(text, str):
            raise ValueError(f"{path}: example {i} has {text!r} for {columns[0]!r}, which is not a text")
    return data.select_columns(list(columns))


def _read(source: Path) -> datasets.Dataset:
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    if source.is_dir():
        return datasets.load_from_disk(str(source))
    if source.suffix not in FORMATS:
        raise ValueError(
            f"{source}: unknown format; use one of {', '.join(FORMATS)}, or a saved dataset's folder"
        )
    if not source.stat().st_size:
        raise ValueError(f"{source}: the file is empty")
    reader = getattr(datasets.Dataset, f"from_{FORMATS[source.suffix]}")
    try:
        with (
            TemporaryDirectory() as cache,
            _quiet(),
        ):  # the texts end up in memory; a cache would outlive its use
            return reader(str(source), keep_in_memory=True, cache_dir=cache)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise ValueError(f"{source}: cannot be read as {FORMATS[source.suffix]} ({error})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar for what takes a second."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def warn_of_overlap(name: str, calibration: Sequence[str], test: Sequence[str]) -> None:
    """Warn when test examples are among the calibration examples: scores on them would be transductive."""
    shared = len(set(calibration) & set(test))
    if shared:
        warnings.warn(
            f"{name}: {shared} of {len(set(test))} test examples are calibration examples too; "
            "scores on them say how well they were memorised. Use a separate split.",
            stacklevel=2,
        )


def sample(seed: int, expert: int, step: int, size: int, count: int) -> list[int]:
    """The `size` example numbers that step `step` takes of an expert with `count` examples.

    Consecutive steps walk through one permutation after another: every example is seen once before
    any is seen again, and batches run on across the seam.
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
    """Item t is everything that optimizer step t needs."""

    def __init__(
        self,
        texts: Sequence[Sequence[str]],  # one list an expert
        tokenize: Tokenizer,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.texts, self.tokenize = texts, tokenize
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world_size = rank, world_size

    def __getitem__(self, step: int) -> Step:
        return [self._batch(expert, step) for expert in range(len(self.texts))]

    def _batch(self, expert: int, step: int) -> Batch:
        texts = self.texts[expert]
        chosen = sample(self.seed, expert, step, self.batch_size, len(texts))[self.rank :: self.world_size]
        inputs = self.tokenize([texts[i] for i in chosen])
        return Batch(expert, inputs, inputs["attention_mask"].bool(), torch.tensor(chosen))


class _FromStep(Sampler[int]):
    """Steps first .. last; its length is the whole run's, which is how Lightning counts."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.last))

    def __len__(self) -> int:
        return self.last


class Calibration(pl.LightningDataModule):
    """One stream of unlabeled examples an expert; a batch holds `batch_size` of each.

    Args:
        files: Expert -> file of its unlabeled examples.
        tokenizer: Folder of the base's tokenizer.
        test_files: Expert -> file of its test examples, to warn when the two overlap.
        batch_size: Examples an expert and step, over all processes.
        max_length: Texts are cut at this many tokens.
        text_column: The column that holds the text.
        max_examples: Use the first so many examples of each expert; all of them by default.
        seed: The data order is a function of this and the step.
        num_workers: Processes that tokenize ahead.
    """

    def __init__(
        self,
        files: Mapping[str, str],
        tokenizer: str,
        test_files: Mapping[str, str] | None = None,
        batch_size: int = 16,
        max_length: int = 256,
        text_column: str = "text",
        max_examples: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or (max_examples is not None and max_examples < 1):
            raise ValueError("data.batch_size and data.max_examples must be at least 1")
        self.files, self.test_files = dict(files), dict(test_files or {})
        self.batch_size, self.text_column = batch_size, text_column
        self.seed, self.num_workers = seed, num_workers
        self.tokenize = Tokenizer(tokenizer, max_length)
        self.max_examples = max_examples
        self.texts = [
            list(load_examples(file, [text_column])[text_column][:max_examples])
            for file in self.files.values()
        ]
        for name, texts in zip(self.files, self.texts, strict=True):
            if name in self.test_files:
                warn_of_overlap(name, texts, load_examples(self.test_files[name], [text_column])[text_column])
        self._consumed = 0

    def identities(self) -> dict[str, str]:
        """Expert -> SHA-256 of its texts."""
        texts = (json.dumps(of_expert).encode() for of_expert in self.texts)
        return {name: sha256(text).hexdigest() for name, text in zip(self.files, texts, strict=True)}

    def settings(self) -> dict[str, Any]:
        """What the batches depend on beside the files: a resumed run must have the same."""
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "max_length": self.tokenize.max_length,
            "text_column": self.text_column,
            "max_examples": self.max_examples,
        }

    def state_dict(self) -> dict[str, Any]:
        """How far the run is: one number, the same on every process."""
        return {"consumed": self.trainer.global_step if self.trainer else self._consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last consumed step."""
        self._consumed = state["consumed"]

    def train_dataloader(self) -> DataLoader[Step]:
        """The remaining steps of the run, one item each."""
        trainer = self.trainer
        assert trainer is not None
        steps = Steps(
            self.texts, self.tokenize, self.batch_size, self.seed, trainer.global_rank, trainer.world_size
        )
        sampler = _FromStep(self._consumed, trainer.max_steps)
        return DataLoader(steps, batch_size=None, sampler=sampler, num_workers=self.num_workers)
