"""What flows through a step.

Legend: `B` examples, `T` tokens, `V` vocabulary or classes, `D` hidden size.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Unlabeled examples of one expert. A NamedTuple, so that Lightning moves it to the device."""

    expert: int  # which expert these are calibration data of
    inputs: Mapping[str, Tensor]  # what the model is called with, each [B, T]
    mask: Tensor  # [B, T] bool: positions that count
    ids: Tensor  # [B] int64: which of the expert's calibration examples these are
    teacher: Tensor | None = (
        None  # [B, V] float32: the expert's own log-probabilities, if they were asked for
    )


class Outputs(NamedTuple):
    """What an objective may look at."""

    logits: Tensor  # [B, V] from a classification head, or [B, T, V] from a language model


Step = list[Batch]  # the micro-batches of one optimizer step, all experts
