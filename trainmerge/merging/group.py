"""One parameter in all models of a merge, read in pieces of rows.

Legend: `K` models, `*S` shape of a parameter or of some rows of it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trainmerge.kernels import ExpertWeight, accumulation_dtype
from trainmerge.merging.values import Number, Place, value_at
from trainmerge.task_vectors.delta import Delta, dense_term
from trainmerge.task_vectors.pieces import in_pieces

OWN = -1  # the index of the reference checkpoint among the models

Rule = Callable[["Piece"], Tensor]  # a piece -> its merged rows [*S], float32 or wider


@dataclass(frozen=True)
class Piece:
    """Some rows in all models."""

    name: str  # of the parameter and its rows
    weights: Tensor  # [K, *S], float32 or wider
    base: Tensor | None  # [*S], of a merge with a base model

    @property
    def taus(self) -> Tensor:
        """The models' differences from the base model, [K, *S]."""
        assert self.base is not None
        return self.weights - self.base


@dataclass(frozen=True)
class Group:
    """One parameter in all models, and the method's settings for it."""

    delta: Delta  # from the reference checkpoint
    order: tuple[int, ...]  # per model: its term, or OWN
    names: tuple[str, ...]  # of the K models
    based: bool  # whether the reference checkpoint is the base model
    place: Place
    shared: dict[str, object]  # parameter -> its value in the file, or its default
    each: dict[str, tuple[object, ...]]  # parameter -> the value of each model

    def number(self, key: str) -> float:
        """A setting for all models."""
        return float(self.given(key, self.shared[key]))

    def flag(self, key: str) -> bool:
        """A setting for all models that is true or false."""
        return bool(self.given(key, self.shared[key]))

    def numbers(self, key: str) -> list[float]:
        """A setting of each model, K numbers."""
        return [
            float(self.given(key, own, model)) for own, model in zip(self.each[key], self.names, strict=True)
        ]

    def given(self, key: str, value: object, model: str = "") -> Number:
        """The value here of one setting.

        Raises:
            ValueError: no filter matches the parameter.
        """
        values = value if isinstance(value, Alternatives) else Alternatives((value,))
        for one in values.files:
            if (found := value_at(one, self.place)) is not None:
                return found
        raise ValueError(
            f"{self.place.name}: no value of `{key}`{f' for {model}' if model else ''}: its filters match "
            "other tensors only; add a last entry without a filter, {value: ...}"
        )

    def pieces(self) -> Iterator[Piece]:
        """All rows, in order. A vector is one piece."""
        vector = self.delta.base.dim() < 2
        entries = max(1, self.delta.base.numel()) if vector else None
        for _, name, part in in_pieces(self.place.name, self.delta, entries):
            dtype = accumulation_dtype(part.base.dtype)
            base = part.base.to(dtype)
            weights = torch.stack([self._weight(part, index, base) for index in self.order])
            yield Piece(name, weights, base if self.based else None)

    def _weight(self, part: Delta, index: int, base: Tensor) -> Tensor:
        """One model's rows [*S]: read as they are, where the file has them."""
        if index == OWN:
            return base
        term = part.terms[index]
        if isinstance(term, ExpertWeight):
            return term.weight.to(base.dtype)
        return base + dense_term(term, part.base)


@dataclass(frozen=True)
class Alternatives:
    """A setting's values in the order in which they count: the model's own, then the file's for all."""

    files: tuple[object, ...]
