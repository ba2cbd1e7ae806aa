"""The batches of a step and the model's outputs.

Legend: `B` examples, `T` tokens, `V` vocabulary or classes, `D` hidden size, `E` embedding's width; `P`
counted positions of a batch, row-major over its mask; `R` rows of logits: `P` for a language model, `B` under
a classification head.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# What logits mean: `classes` [B, V], one row per example; `tokens` [B, T, V], one per position of the mask;
# `spans` [B, 2, T], begin and end of an answer among the positions; `labels` [B, V, 2], each label's yes and
# no; `values` [B, V], numbers of a regression.
Kind = Literal["classes", "tokens", "spans", "labels", "values"]


class Asks(NamedTuple):
    """The expert outputs that an objective needs, recorded on each expert's own calibration examples."""

    temperature: float | None = None  # record log-probabilities at this temperature; None: none
    layers: tuple[int, ...] = ()  # hidden states to record, by transformers' index: 0 the embeddings
    dtype: torch.dtype = torch.bfloat16  # of the recorded hidden states
    embedding: str | None = None  # record sentence embeddings of this pooling; `modules`: by modules.json

    def identity(self) -> str:
        """A text that identifies them; as in version 0.1.0 for what that could record."""
        exact = "" if self.dtype == torch.bfloat16 else f", dtype={self.dtype}"
        exact += "" if self.embedding is None else f", embedding={self.embedding!r}"
        return f"Asks(temperature={self.temperature!r}, layers={self.layers!r}{exact})"


class Predictions(NamedTuple):
    """An expert's log-probabilities: all of them, or the `m` largest and the mass of the others."""

    log_p: Tensor  # [R, m] float32
    tokens: Tensor | None = None  # [R, m] int32: their tokens or classes; None: m = V, in order
    tail: Tensor | None = None  # [R] float32: log of the mass outside `tokens`


class Signals(NamedTuple):
    """The recorded outputs of the batch's expert that the objective needs."""

    predictions: Predictions | None = None
    hidden: Mapping[int, Tensor] = {}  # layer -> [P, D] of `Asks.dtype`
    values: Tensor | None = None  # [B, V] float32, of a regression
    embedding: Tensor | None = None  # [B, E] float32


class Batch(NamedTuple):
    """Unlabeled examples of one expert. A NamedTuple, so that Lightning moves it to the device."""

    expert: int  # the expert whose calibration data these are
    inputs: Mapping[str, Tensor]  # the model's arguments, each [B, ...] unless in `rows`
    mask: Tensor  # [B, T] bool: positions that enter the loss
    ids: Tensor  # [B] int64: indices among the expert's calibration examples
    teacher: Signals | None = None  # if the objective needs it
    share: float = 1.0  # these examples over an equal part of the step's; not 1 if a batch is split
    rows: Mapping[str, Sequence[int]] = {}  # inputs with other than one row per example: B numbers of rows


class Outputs(NamedTuple):
    """The model outputs that an objective can use."""

    logits: Tensor  # [B, V] of a classification head, [B, T, V] of a language model; [0] if there is no head
    hidden: Mapping[int, Tensor] = {}  # layer -> [B, T, D], the layers that the objective needs
    of: Kind | None = None  # what the logits are, of an expert's own head; None: as their shape says
    embedding: Tensor | None = None  # [B, E] of the sentences, if the objective needs it

    @property
    def kind(self) -> Kind:
        """What the logits are."""
        return self.of or ("classes" if self.logits.dim() == 2 else "tokens")


Step = list[Batch]  # the micro-batches of one optimizer step, all experts
