"""Measures as torchmetrics states: sums and counts that add up over processes.

Legend: `B` examples, `T` tokens, `V` classes or vocabulary.
"""

import math

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassF1Score
from typing_extensions import override

BINS = 15  # of the calibration error: Guo et al., ICML 2017


def class_measures(classes: int) -> MetricCollection:
    """Accuracy over examples, macro F1 and calibration error of probabilities [B, V]."""
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(classes, average="micro"),  # torchmetrics' default is macro
            "macro_f1": MulticlassF1Score(classes, average="macro"),
            "calibration_error": MulticlassCalibrationError(classes, n_bins=BINS, norm="l1"),
        }
    )


class TokenLosses(Metric):
    """Perplexity and, with `bits`, bits per byte from summed negative log-likelihoods.

    In the log domain and float64: torchmetrics' own Perplexity takes the logarithm of a float32 probability,
        which is infinite if that underflows.
    """

    full_state_update = False
    loss: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self, bits: bool = True) -> None:
        super().__init__()
        self.bits = bits
        for name in ("loss", "tokens", "bytes"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, losses: Tensor, tokens: Tensor, sizes: Tensor) -> None:
        """Add texts: nats, predicted tokens, and the UTF-8 bytes of these tokens, all [B]."""
        self.loss += losses.sum()
        self.tokens += tokens.sum()
        self.bytes += sizes.sum()

    @override
    def compute(self) -> dict[str, Tensor]:
        """Exp of the mean loss per token, and bits per byte; NaN if nothing was predicted."""
        bits = {"bits_per_byte": self.loss / math.log(2) / self.bytes} if self.bits else {}
        return {"perplexity": torch.exp(self.loss / self.tokens), **bits}


class AnswerLengths(Metric):
    """Mean tokens per answer, and the share of answers truncated before their end."""

    full_state_update = False
    tokens: Tensor
    unfinished: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("tokens", "unfinished", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, tokens: int, finished: bool) -> None:
        """Add one answer."""
        self.tokens += tokens
        self.unfinished += not finished
        self.count += 1

    @override
    def compute(self) -> dict[str, Tensor]:
        """Means over the answers."""
        return {
            "answer_tokens": self.tokens / self.count,
            "answers_cut": self.unfinished / self.count,
        }
