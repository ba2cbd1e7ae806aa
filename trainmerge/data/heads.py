"""Frozen classification heads: they belong to their task and are never merged.

Legend: `B` examples, `T` tokens, `D` hidden size, `V` classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.data.classifier import Classifier, Pooling, PoolingOfFile, pool
from trainmerge.data.label_texts import checked_labels, checked_templates, read_labels, read_templates
from trainmerge.system.ranges import check_fields
from trainmerge.system.safetensors_file import MappedFile, sha256

TEXT_SCALE = 20.0  # of cosines, for text models
Encode = Callable[[Sequence[str]], tuple[Tensor, Tensor]]  # texts -> hidden states [B, T, D], mask [B, T]


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

    Args:
        labels: A list, or the path of a JSON list.
        scale: Logits are `scale` x cosine. At its default, CLIP and SigLIP use their own `logit_scale`.
        pooling: How a text model's hidden states become one vector. CLIP and SigLIP have their own.
        templates: Texts with {} for the label, or the path of a JSON list of them: a label's embedding is the
            mean of its texts' unit embeddings, at unit length (Radford et al., CLIP, ICML 2021, section
            3.1.4). Without templates a label is its own text.
    """

    labels: Sequence[str] | str
    scale: float = TEXT_SCALE
    pooling: Pooling = "mean"
    # Outside the repr, which identities of older runs have.
    templates: Sequence[str] | str | None = field(default=None, repr=False, metadata={"added": "0.2.0"})

    def __post_init__(self) -> None:
        check_fields(self, scale="(0, inf)")

    @override
    def build(self, encode: Encode) -> Classifier:
        return Classifier(self.scale * self.embeddings(encode), None, self.pooling, normalise=True)

    def embeddings(self, encode: Encode) -> Tensor:
        """The labels' unit embeddings, [V, D]."""
        templates = self.prompts()
        if not templates:
            hidden, mask = encode(self.texts())
            return torch.nn.functional.normalize(pool(hidden, mask, self.pooling), dim=-1)
        each = []
        for label in self.texts():
            hidden, mask = encode([template.replace("{}", label) for template in templates])
            own = torch.nn.functional.normalize(pool(hidden, mask, self.pooling), dim=-1)
            each.append(own.mean(dim=0))
        return torch.nn.functional.normalize(torch.stack(each), dim=-1)

    @override
    def identity(self) -> str:
        templates = self.prompts()
        return f"{self!r} {self.texts()}" + (f" {templates}" if templates else "")

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
        return checked_labels("LabelHead.labels", list(self.labels))

    def prompts(self) -> list[str]:
        """The templates; raises ValueError if they are no texts with {} in each."""
        if isinstance(self.templates, str):
            return read_templates(Path(self.templates))
        return checked_templates("LabelHead.templates", list(self.templates or ()))


@dataclass(frozen=True)
class LinearHead(Head):
    """A linear layer that was trained with the expert, read from a safetensors file."""

    file: str
    weight: str = "classifier.weight"  # [V, D]
    bias: str | None = "classifier.bias"  # [V]
    pooling: PoolingOfFile = "first"  # `pooled`: the model's pooled output or image embedding

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
