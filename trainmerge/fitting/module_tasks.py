"""The tasks of a module in memory: batches of one's own loaders, experts' outputs on them, and losses.

Legend: `B` examples, `T` positions of one, `V` classes, `D` hidden size, `P` all positions of a batch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainmerge.data.batch import Asks, Batch, Outputs, Predictions, Signals
from trainmerge.fitting.contents import content_sha256
from trainmerge.model.batch_norm import Forward
from trainmerge.model.merged_model import MergedModel
from trainmerge.objectives import Objective
from trainmerge.task_vectors.buffers import holding
from trainmerge.task_vectors.state_dicts import StateDict

PlainLoss = Callable[[Any, Any], Tensor]  # what `forward` returned, and its batch -> a loss, or one each [B]


@dataclass
class Stream:
    """A loader's batches again and again. Those of a list are numbered, so that outputs on them can be kept.

    Raises ValueError for a loader that can be iterated once only, or that is empty.
    """

    name: str
    loader: Iterable[Any]
    compared: bool = False  # whether `digest` is that of all batches so far
    digest: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.loader, Iterator):
            raise ValueError(
                f"loaders: {self.name} is an iterator, which ends after one pass: give a list of batches, or "
                "a DataLoader"
            )
        self._batches = self._forever()

    def take(self) -> tuple[Any, int | None]:
        """The next batch, and its number in a list."""
        batch, number = next(self._batches)
        if self.compared:
            try:
                self.digest = content_sha256([self.digest, batch])
            except ValueError as error:
                raise ValueError(
                    f"loaders: {self.name}: {error}, so a run could not tell whether it resumes with the "
                    "same batches: give tensors in lists or mappings, or leave out `run`"
                ) from error
        return batch, number

    def _forever(self) -> Iterator[tuple[Any, int | None]]:
        numbered = isinstance(self.loader, Sequence)
        while True:
            count = 0
            for count, batch in enumerate(self.loader, 1):
                yield batch, count - 1 if numbered else None
            if not count:
                raise ValueError(f"loaders: {self.name} has no batch")


@dataclass
class ModuleTasks:
    """Losses of the tasks, given their batches.

    Args:
        merged: The merge in memory; its module is in evaluation mode.
        loss: An objective, or a function of outputs and batch.
        forward: Runs the module on a batch.
        weights: Of the tasks' losses, K.
        experts: Each expert's buffers by name: its own statistics belong to it, K.
    """

    merged: MergedModel
    loss: Objective | PlainLoss
    forward: Forward
    weights: Sequence[float]
    experts: Sequence[StateDict]
    recorded: dict[tuple[int, int], Signals] = field(default_factory=dict)

    @property
    def asks(self) -> Asks:
        """The expert outputs that the loss needs."""
        return self.loss.asks if isinstance(self.loss, Objective) else Asks()

    def signals(self, expert: int, batch: Any, number: int | None) -> Signals | None:
        """An expert's outputs on a batch, at once; those on a numbered batch are computed once."""
        if self.asks == Asks():
            return None
        if number is not None and (expert, number) in self.recorded:
            return self.recorded[expert, number]
        with torch.no_grad(), self.merged.teacher(expert) as module, holding(module, self.experts[expert]):
            found = signals_of(outputs_of(self.forward(module, batch)), self.asks)
        if number is not None:
            self.recorded[expert, number] = found
        return found

    def losses(self, batches: Sequence[Any], signals: Sequence[Signals | None]) -> Callable[[Batch], Tensor]:
        """The weighted loss of the expert that a `Batch` names, on its batch of this step."""

        def loss(turn: Batch) -> Tensor:
            given = self.forward(self.merged.module, batches[turn.expert])
            if isinstance(self.loss, Objective):
                outputs = outputs_of(given)
                losses = self.loss(outputs, as_batch(turn.expert, outputs, signals[turn.expert]))
            else:
                losses = self.loss(given, batches[turn.expert])
            return self.merged.loss_scale(self.weights[turn.expert] * losses.mean())

        return loss


def outputs_of(given: Any) -> Outputs:
    """What a forward returned, as outputs: a tensor is the logits; of transformers' outputs the logits.

    Hidden states [B, D] become [B, 1, D].

    Raises:
        ValueError: no logits, or logits of another shape than [B, V] or [B, T, V].
    """
    logits = given if isinstance(given, Tensor) else getattr(given, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 3):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(given).__name__
        raise ValueError(
            f"forward returned {shape}; an objective needs logits [B, V] or [B, T, V], or tm.Outputs with "
            "them. Give `forward`, or a loss of your own (outputs, batch)"
        )
    hidden = given.hidden if isinstance(given, Outputs) else {}
    return Outputs(logits, {i: h[:, None] if h.dim() == 2 else h for i, h in hidden.items()})


def as_batch(expert: int, outputs: Outputs, signals: Signals | None) -> Batch:
    """A batch without padding, as objectives read it."""
    sizes = [h.shape[1] for h in outputs.hidden.values()]
    positions = outputs.logits.shape[1] if outputs.logits.dim() == 3 else sizes[0] if sizes else 1
    count, device = len(outputs.logits), outputs.logits.device
    mask = torch.ones(count, positions, dtype=torch.bool, device=device)
    return Batch(expert, {}, mask, torch.arange(count), signals)


def signals_of(outputs: Outputs, asks: Asks) -> Signals:
    """An expert's outputs as an objective reads them.

    Raises:
        ValueError: the objective needs hidden states that `forward` did not return.
    """
    predictions = None
    if asks.temperature is not None:
        rows = outputs.logits.flatten(0, -2)
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        predictions = Predictions((wide / asks.temperature).log_softmax(-1))
    if missing := [layer for layer in asks.layers if layer not in outputs.hidden]:
        raise ValueError(
            f"the objective needs the hidden states of layers {missing}: `forward` must return "
            "tm.Outputs(logits, {layer: hidden})"
        )
    hidden = {layer: outputs.hidden[layer].flatten(0, 1).to(asks.dtype) for layer in asks.layers}
    return Signals(predictions, hidden)
