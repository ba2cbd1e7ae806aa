"""What flows through a step.

Legend: `B` examples, `T` tokens, `V` vocabulary or classes, `D` hidden size; `P` counted positions of a
batch, row-major over its mask; `R` rows of logits: `P` for a language model, `B` under a classification head.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Asks(NamedTuple):
    """What an objective wants every expert to be recorded with, on its own calibration examples."""

    temperature: float | None = None  # the logits, as log-probabilities at this temperature; None: none
    layers: tuple[int, ...] = ()  # hidden states by transformers' index: 0 the embeddings, -1 the last


class Predictions(NamedTuple):
    """An expert's log-probabilities: all of them, or the `m` largest and the mass of the others."""

    log_p: Tensor  # [R, m] float32
    tokens: Tensor | None = None  # [R, m] int32: whose they are; None: m = V, in order
    tail: Tensor | None = None  # [R] float32: log of the mass outside `tokens`


class Signals(NamedTuple):
    """The signals of the batch's own expert that the objective needs."""

    predictions: Predictions | None = None
    hidden: Mapping[int, Tensor] = {}  # layer -> [P, D] bfloat16


class Batch(NamedTuple):
    """Unlabeled examples of one expert. A NamedTuple, so that Lightning moves it to the device."""

    expert: int  # which expert these are calibration data of
    inputs: Mapping[str, Tensor]  # what the model is called with, each [B, ...]
    mask: Tensor  # [B, T] bool: positions that count
    ids: Tensor  # [B] int64: which of the expert's calibration examples these are
    teacher: Signals | None = None  # if the objective asks for it
    share: float = 1.0  # these examples over an even part of the step's: other than 1 where they are divided


class Outputs(NamedTuple):
    """What an objective may look at."""

    logits: Tensor  # [B, V] from a classification head, or [B, T, V] from a language model
    hidden: Mapping[int, Tensor] = {}  # layer -> [B, T, D], the layers that the objective needs


Step = list[Batch]  # the micro-batches of one optimizer step, all experts
