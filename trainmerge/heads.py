"""Frozen classification heads: they belong to their task and are never merged.

Legend: `B` examples, `T` tokens, `D` hidden size, `V` classes.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from typing_extensions import override

from trainmerge.storage import sha256

Pooling = Literal["mean", "first"]
Encode = Callable[[Sequence[str]], tuple[Tensor, Tensor]]  # texts -> hidden states [B, T, D], mask [B, T]


class Classifier(NamedTuple):
    """A head ready for use: logits [B, V] = pooled hidden state @ weight.T + bias."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    pooling: Pooling
    normalise: bool

    def to(self, device: torch.device) -> "Classifier":
        """The same head on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        return self._replace(weight=self.weight.to(device), bias=bias)

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Class logits [B, V] from hidden states [B, T, D] and mask [B, T]."""
        pooled = pool(hidden, mask, self.pooling)
        if self.normalise:
            pooled = torch.nn.functional.normalize(pooled, dim=-1)
        return torch.nn.functional.linear(
            pooled, self.weight.to(pooled), None if self.bias is None else self.bias.to(pooled)
        )


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector an example: [B, T, D], [B, T] -> [B, D]; padding, on either side, never counts."""
    if pooling == "first":
        first = mask.int().argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), first]
    weights = mask[..., None].float()  # float32: the sum over a long text overflows float16
    return ((hidden * weights).sum(dim=1) / weights.sum(dim=1)).to(hidden.dtype)


@dataclass(frozen=True)
class Head(ABC):
    """How a task's classifier is made, before any model is loaded."""

    @abstractmethod
    def build(self, encode: Encode) -> Classifier:
        """The frozen classifier; `encode` runs the base model."""

    @abstractmethod
    def identity(self) -> str:
        """Its settings and a digest of what it reads: another head, another identity."""


@dataclass(frozen=True)
class LabelHead(Head):
    """Cosine to the label texts' embeddings under the base model, as CLIP's zero-shot head.

    Logits are `scale` x cosine. Labels are a list, or the path of a JSON list.
    """

    labels: Sequence[str] | str
    scale: float = 20.0
    pooling: Pooling = "mean"

    @override
    def build(self, encode: Encode) -> Classifier:
        hidden, mask = encode(self.texts())
        embeddings = torch.nn.functional.normalize(pool(hidden, mask, self.pooling), dim=-1)
        return Classifier(self.scale * embeddings, None, self.pooling, normalise=True)

    @override
    def identity(self) -> str:
        return f"{self!r} {self.texts()}"

    def texts(self) -> list[str]:
        """The label texts, in class order.

        Raises:
            ValueError: the file is not a JSON list of at least two texts.
        """
        if not isinstance(self.labels, str):
            return list(self.labels)
        return read_labels(Path(self.labels))


@dataclass(frozen=True)
class LinearHead(Head):
    """A linear layer that was trained with the expert, read from a safetensors file."""

    file: str
    weight: str = "classifier.weight"  # [V, D]
    bias: str | None = "classifier.bias"  # [V]
    pooling: Pooling = "first"

    @override
    def build(self, encode: Encode) -> Classifier:
        with safe_open(self.file, framework="pt") as tensors:
            absent = {name for name in (self.weight, self.bias) if name} - set(tensors.keys())
            if absent:
                raise ValueError(
                    f"{self.file}: no tensor {sorted(absent)}; it holds {sorted(tensors.keys())[:5]} ..."
                )
            bias = tensors.get_tensor(self.bias) if self.bias else None
            return Classifier(tensors.get_tensor(self.weight), bias, self.pooling, normalise=False)

    @override
    def identity(self) -> str:
        return f"{self!r} {sha256(Path(self.file))}"


def read_labels(path: Path) -> list[str]:
    """A JSON list of label texts."""
    try:
        labels = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(labels, list) or len(labels) < 2 or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{path}: a JSON list of at least two label texts is needed")
    return labels
