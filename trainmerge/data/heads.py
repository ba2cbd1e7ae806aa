"""Frozen classification heads: they belong to their task and are never merged.

Legend: `B` examples, `T` tokens, `D` hidden size, `V` classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.system.json_file import parse_json, read_bytes
from trainmerge.system.ranges import check_fields
from trainmerge.system.safetensors_file import MappedFile, sha256

Pooling = Literal["mean", "first"]
Encode = Callable[[Sequence[str]], tuple[Tensor, Tensor]]  # texts -> hidden states [B, T, D], mask [B, T]


class Classifier(NamedTuple):
    """A head ready for use: logits [B, V] = pooled hidden state @ weight.T + bias."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    pooling: Pooling
    normalise: bool

    @property
    def width(self) -> int:
        """The number of classes."""
        return len(self.weight)

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
    """One vector per example: [B, T, D], [B, T] -> [B, D]; padding, on either side, never counts."""
    if pooling == "first":
        first = mask.int().argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), first]
    weights = mask[..., None].float()  # float32: the sum over a long text overflows float16
    return ((hidden * weights).sum(dim=1) / weights.sum(dim=1)).to(hidden.dtype)


@dataclass(frozen=True)
class Head(ABC):
    """The description of a task's classifier, before any model is loaded."""

    @abstractmethod
    def build(self, encode: Encode) -> Classifier:
        """The frozen classifier; `encode` runs the base model."""

    @abstractmethod
    def identity(self) -> str:
        """Its settings and a digest of the files it reads."""

    def width(self) -> int | None:
        """The hidden size that it needs; None accepts any."""
        return None

    def classes(self) -> int | None:
        """The number of classes; None if it is known only when the head is built."""
        return None


@dataclass(frozen=True)
class LabelHead(Head):
    """Cosine similarity to the label texts' embeddings under the base model, as CLIP's zero-shot head.

    Logits are `scale` x cosine. Labels are a list, or the path of a JSON list.
    """

    labels: Sequence[str] | str
    scale: float = 20.0
    pooling: Pooling = "mean"

    def __post_init__(self) -> None:
        check_fields(self, scale="(0, inf)")

    @override
    def build(self, encode: Encode) -> Classifier:
        hidden, mask = encode(self.texts())
        embeddings = torch.nn.functional.normalize(pool(hidden, mask, self.pooling), dim=-1)
        return Classifier(self.scale * embeddings, None, self.pooling, normalise=True)

    @override
    def identity(self) -> str:
        return f"{self!r} {self.texts()}"

    @override
    def classes(self) -> int:
        return len(self.texts())

    def texts(self) -> list[str]:
        """The label texts, in class order.

        Raises:
            ValueError: not a list of at least two different texts, or a file without one.
        """
        if isinstance(self.labels, str):
            return read_labels(Path(self.labels))
        return _checked("LabelHead.labels", list(self.labels))


@dataclass(frozen=True)
class LinearHead(Head):
    """A linear layer that was trained with the expert, read from a safetensors file."""

    file: str
    weight: str = "classifier.weight"  # [V, D]
    bias: str | None = "classifier.bias"  # [V]
    pooling: Pooling = "first"

    def __post_init__(self) -> None:
        check_fields(self)

    @override
    def build(self, encode: Encode) -> Classifier:
        file = self._checked_file()
        bias = file.read(self.bias).clone() if self.bias else None
        return Classifier(file.read(self.weight).clone(), bias, self.pooling, normalise=False)

    @override
    def identity(self) -> str:
        return f"{self!r} {sha256(self._checked_file().path)}"

    @override
    def width(self) -> int:
        return self._checked_file().tensors[self.weight].shape[1]

    @override
    def classes(self) -> int:
        return self._checked_file().tensors[self.weight].shape[0]

    def _checked_file(self) -> MappedFile:
        """The file, with its header checked for this head.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a damaged file, or one without these tensors in shapes [V, D] and [V].
        """
        file = MappedFile(self.file)
        absent = {name for name in (self.weight, self.bias) if name} - file.tensors.keys()
        if absent:
            raise ValueError(
                f"{self.file}: no tensor {sorted(absent)}; it has {sorted(file.tensors)[:5]} ..."
            )
        weight = file.tensors[self.weight].shape
        bias = file.tensors[self.bias].shape if self.bias else weight[:1]
        if len(weight) != 2 or bias != weight[:1]:
            raise ValueError(
                f"{self.file}: {self.weight} is {tuple(weight)} and {self.bias} {tuple(bias)}; a linear "
                "layer has a weight [classes, hidden] and a bias [classes]"
            )
        return file


def read_labels(path: Path) -> list[str]:
    """A JSON list of label texts.

    Raises:
        ValueError: the file does not exist, or is not such a list.
    """
    remedy = "Write a JSON list of label texts."
    try:
        return _checked(str(path), parse_json(read_bytes(path, remedy), path, remedy))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: the label texts cannot be read: no such file") from error


def _checked(where: str, labels: Any) -> list[str]:
    """The label texts, checked; raises ValueError, naming `where` they are from, if they are unusable."""
    if not isinstance(labels, list) or len(labels) < 2 or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{where}: needs a list of at least two label texts")
    if unusable := [label for label in labels if not label.strip() or labels.count(label) > 1]:
        raise ValueError(f"{where}: label texts must be distinct and not blank, not {sorted(set(unusable))}")
    return labels
