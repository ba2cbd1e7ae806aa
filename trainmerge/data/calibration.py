"""Unlabeled examples -> one batch per expert and step.

The data order is a pure function of (seed, step). So the step number is all that is needed to resume, also
mid-epoch, with a different number of workers or processes.
"""

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from trainmerge.data.batch import Step
from trainmerge.data.columns import Columns
from trainmerge.data.examples import (
    Example,
    contents,
    examples_identity,
    read_examples,
    subject,
    warn_of_overlap,
)
from trainmerge.data.generate import Generate
from trainmerge.data.held_out import split
from trainmerge.data.steps import FromStep, Steps
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.system.ranges import check_option
from trainmerge.system.workspace import VOCABULARY


def recorded_tokenizer(tokenizer: str) -> str:
    """The tokenizer as a run records it: a folder that was made for it by its name, which is a digest."""
    name = Path(tokenizer).name
    return name if name.startswith(VOCABULARY) else tokenizer


class Calibration(pl.LightningDataModule):
    """One stream of unlabeled examples per expert; a step has `batch_size` of each.

    Args:
        files: Expert -> file of its unlabeled examples, or the texts that it writes itself before the fit.
        tokenizer: Folder of the merge's tokenizer: the base, or `Recipe.tokenizer_folder`.
        test_files: Expert -> file of its test examples, to warn when the two overlap.
        batch_size: Examples per expert and step, over all processes.
        max_length: Texts are truncated to this many tokens.
        columns: The columns of text, chat, spans, decoder's target, picture and sound.
        max_examples: Use the first so many examples of each expert; by default all.
        seed: The data order is a function of this and the step.
        num_workers: Processes that tokenise ahead.
        held_out: The share of each expert's examples that the fit does not see; `StopOnHeldOut` and
            `trainmerge auto` judge merges by them.
    """

    def __init__(
        self,
        files: Mapping[str, str | Generate],
        tokenizer: str,
        test_files: Mapping[str, str] | None = None,
        batch_size: int = 16,
        max_length: int = 256,
        columns: Columns = Columns(),  # noqa: B008 - frozen
        max_examples: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        held_out: float = 0.0,
    ) -> None:
        super().__init__()
        check_option("data.batch_size", batch_size, int, "[1, 1e6]")
        check_option("data.max_length", max_length, int, f"[1, {sys.maxsize}]")
        check_option("data.max_examples", max_examples, int | None, "[1, inf)")
        check_option("data.seed", seed, int, "[0, inf)")
        check_option("data.num_workers", num_workers, int, "[0, inf)")
        check_option("data.held_out", held_out, float, "[0, 0.5]")
        self.files, self.test_files = dict(files), dict(test_files or {})
        self.batch_size, self.columns = batch_size, columns
        self.seed, self.num_workers = seed, num_workers
        self.tokenizer, self.max_length, self.max_examples = tokenizer, max_length, max_examples
        self.written: dict[str, str] = {}  # expert -> SHA-256 of the file of its own texts, once it is read
        self.unwritten = {name: file for name, file in self.files.items() if isinstance(file, Generate)}
        self.examples = [self._read(file) for file in self.files.values()]
        for name, examples in zip(self.files, self.examples, strict=True):
            if len(examples) == 1:
                warnings.warn(
                    f"{name}: only one calibration example; the merge will overfit it", stacklevel=2
                )
            if name in self.test_files and name not in self.unwritten:
                test = read_examples(self.test_files[name], columns.plain(), self._render, located=False)
                warn_of_overlap(name, [subject(e) for e in examples], [subject(e) for e in test])
        self.held_out = held_out
        self._held = self._hold_out()
        self._consumed = 0

    def _read(self, file: str | Generate) -> list[Example]:
        """A file's examples; placeholders of texts that are not written yet."""
        if isinstance(file, Generate):
            return file.placeholders(self.columns, self.max_examples)
        return read_examples(file, self.columns, self._render, self.max_examples)

    def fill(self, name: str, file: str) -> None:
        """Read the file of the texts that an expert has written, in place of the placeholders."""
        k = [*self.files].index(name)
        self.examples[k], self._held[k] = split(self._read(file), self.held_out, self.seed, k)
        self.unwritten.pop(name)
        self.written[name] = sha256(Path(file).read_bytes()).hexdigest()

    def _hold_out(self) -> list[list[Example]]:
        """Take the held-out examples out of `examples`; returns them."""
        parts = [split(own, self.held_out, self.seed, k) for k, own in enumerate(self.examples)]
        self.examples = [learned_from for learned_from, _ in parts]
        return [held for _, held in parts]

    def held_out_part(self, limit: int | None = None) -> "Calibration":
        """The same with the held-out examples, or the first so many of each expert's, to learn nothing from.

        Raises:
            ValueError: none are held out.
        """
        if not self.held_out:
            raise ValueError("no examples are held out: set data.held_out to a share, such as 0.2")
        return self.with_examples([own[:limit] for own in self._held])

    def learning_part(self, limit: int | None = None) -> "Calibration":
        """The same with the first so many examples of each expert's that the fit learns from."""
        return self.with_examples([own[:limit] for own in self.examples])

    def with_examples(self, examples: list[list[Example]]) -> "Calibration":
        """The same settings for other examples of the experts, K lists."""
        other = copy(self)
        other.files = dict.fromkeys(self.files, "")  # known by their contents, written ones too
        other.unwritten, other.written = {}, {}
        vars(other).pop("_identities", None)
        other.examples, other._held = examples, [[]] * len(examples)
        return other

    @cached_property
    def tokenize(self) -> Tokenizer:
        """The merge's tokenizer, loaded on first use."""
        return Tokenizer(self.tokenizer, self.max_length)

    def _render(self, chat: Sequence[Mapping[str, str]]) -> Example:
        return self.tokenize.render(chat)

    def identities(self) -> dict[str, str]:
        """Expert -> SHA-256 of its examples, held-out ones too, or of what its own texts depend on."""
        return dict(self._identities)

    @cached_property
    def _identities(self) -> dict[str, str]:
        known = {
            name: [file.identity(), self.seed, self.held_out, self.max_examples]
            if isinstance(file, Generate)
            else [*map(contents, own), *([[*map(contents, held)]] if held else [])]
            for (name, file), own, held in zip(self.files.items(), self.examples, self._held, strict=True)
        }
        return {name: sha256(json.dumps(content).encode()).hexdigest() for name, content in known.items()}

    def settings(self) -> dict[str, Any]:
        """The settings that the batches depend on, which a resumed run must share."""
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "tokenizer": recorded_tokenizer(self.tokenizer),
            "max_length": self.max_length,
            "columns": self.columns.record(),
            "max_examples": self.max_examples,
            **({"held_out": self.held_out} if self.held_out else {}),
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
        sampler = FromStep(self._consumed, trainer.max_steps)
        return DataLoader(steps, batch_size=None, sampler=sampler, num_workers=self.num_workers)
