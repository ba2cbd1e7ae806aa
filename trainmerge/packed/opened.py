"""Packed experts in Python: their state dicts, and a model in memory that changes from one into another."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trainmerge.data.examples import Example
from trainmerge.packed.in_model import tensors_in
from trainmerge.packed.stored import Stored, open_stored
from trainmerge.packed.task_tensors import HeadedTask, read_whole, task_tensors
from trainmerge.system.text import listed

if TYPE_CHECKING:  # imports transformers
    from trainmerge.packed.text_rows import TextRows

SHOWN = 5  # names in an error


@dataclass(frozen=True)
class Packed:
    """A folder of packed experts that was checked against its base; `open_packed` makes it."""

    stored: Stored

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the experts."""
        return self.stored.tasks

    @property
    def bits(self) -> float:
        """Bits per weight and task, over the weights that some expert changes."""
        return self.stored.record.bits

    @property
    def errors(self) -> Mapping[str, float]:
        """Task -> the relative error of its difference from the base."""
        return self.stored.record.errors

    def load(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """The state dict of one expert, one tensor at a time. Raises ValueError for an unknown task."""
        found = task_tensors(self.stored, task)
        return ((name, read_whole(found, name)) for name in found.tensors)

    @torch.no_grad()
    def switch(self, model: nn.Module, task: str) -> None:
        """Change a model in memory into another expert: one pass, in place, in the model's own dtype.

        Only tensors that some task changes and the task's own head are written, so the model must have been
        the base or one of these experts.

        Raises:
            ValueError: an unknown task; or the model lacks one of its tensors, or has another shape there.
                Nothing is written then.
        """
        found = task_tensors(self.stored, task)
        own = found.own if isinstance(found, HeadedTask) else {}
        wanted = [name for name in found.tensors if name in own or found.merged(name)]
        there = tensors_in(model, self.stored.base, wanted)
        shapes = {name: found.tensors[name].shape for name in wanted}
        if wrong := [name for name in wanted if name not in there or there[name].shape != shapes[name]]:
            raise ValueError(
                f"the model is no {task!r} of {self.stored.path}: it lacks {listed(wrong, SHOWN)}, or has "
                "another shape there. Load it from an unpacked folder of this task"
            )
        for name in wanted:
            there[name].copy_(read_whole(found, name))

    def route(self, texts: Sequence[str]) -> list[str]:
        """The task of each text, by the base's hidden states; the base is loaded once.

        It is as good as `packed.json` says: the accuracy on calibration texts that it was not fitted on.

        Raises:
            ValueError: the experts were packed without a router.
        """
        router, rows = self.stored.router, self._rows
        return [self.tasks[number] for number in router(rows(list(map(Example, texts)))).tolist()]

    @cached_property
    def _rows(self) -> "TextRows":
        from trainmerge.packed.text_rows import text_rows  # imports transformers

        told = self.stored.record.router or {}
        return text_rows(self.stored.base, int(told["max_length"]), list(told["ignore"]))


def open_packed(path: str | Path, base: str | Path | None = None, allow_pickle: bool = False) -> Packed:
    """Open a folder of packed experts; the base's files are read once, for their checksums.

    Args:
        path: The folder of `trainmerge export --as packed`.
        base: The base, if it is no longer where the folder names it: a folder, or an id on the hub.
        allow_pickle: Read a base of `.bin` files.

    Raises:
        FileNotFoundError: the folder, one of its files or the base is missing.
        ValueError: a damaged folder, or another base than the experts were packed with.
    """
    return Packed(open_stored(path, base, allow_pickle))


def load_packed(path: str | Path, task: str, base: str | Path | None = None) -> Iterator[tuple[str, Tensor]]:
    """The state dict of one packed expert, one tensor at a time: names as in a checkpoint of the task.

    Args:
        path: The folder of `trainmerge export --as packed`.
        task: The expert's name.
        base: The base, if it is no longer where the folder names it.

    Raises:
        FileNotFoundError: the folder, one of its files or the base is missing.
        ValueError: an unknown task, a damaged folder, or another base.
    """
    return open_packed(path, base).load(task)
