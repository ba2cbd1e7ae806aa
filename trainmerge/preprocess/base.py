"""The interface of preprocessors.

Legend: `K` experts, `*S` parameter shape, `n` inputs of a linear layer; of a router `E` experts of a layer,
`H` hidden size, `R` tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor
from typing_extensions import override

from trainmerge.task_vectors.delta import Delta, TaskVectors


@dataclass(frozen=True)
class Preprocess(ABC):
    """New task vectors from old ones, one parameter at a time, in bounded memory."""

    otherwise: ClassVar[str] = "left as they are"  # parameters to which the method does not apply

    @abstractmethod
    def __call__(self, task_vectors: TaskVectors) -> Iterator[tuple[str, Tensor]]:
        """Every parameter's name and its K new differences [K, *S], in the order of `task_vectors.deltas`."""

    def applies_to(self, name: str, delta: Delta) -> bool:
        """Whether the method itself computes this parameter's result; if not, `otherwise` says what does."""
        del name, delta
        return True

    def otherwise_is(self) -> str:
        """What becomes of the parameters to which the method does not apply, in words."""
        return self.otherwise


class Router(NamedTuple):
    """A router of a mixture of experts, by its tensors in the base's files."""

    weight: str  # [E, H]
    bias: str | None  # [E]
    sigmoid: bool  # whether scores are sigmoids, not a softmax

    @property
    def tensors(self) -> list[str]:
        """Weight and bias."""
        return [self.weight, *([self.bias] if self.bias else [])]


class Calibrator(Protocol):
    """Statistics of the experts on their own unlabeled examples, as in `model.expert_statistics`."""

    def in_order(self, names: Iterable[str]) -> list[str]:
        """These parameters in the network's order."""

    def grams(self, expert: int, names: Sequence[str], merged: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean x x^T [n, n] of the inputs x of each linear layer among `names`; others are left out.

        `merged` are weights that replace the expert's own during the pass.
        """

    def magnitudes(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Mean |x| [n] of the inputs x of each linear layer and norm among `names`; others are left out.

        The model is the base, the examples are those of all experts.
        """

    def gradients(self, expert: int, sampled: bool) -> Iterator[dict[str, Tensor]]:
        """Gradients of -log p(y | x) with respect to the expert's weights, example by example.

        y is drawn from the expert's own predictions, or is the text itself.
        """

    def imitation(self, expert: int) -> Callable[[], tuple[float, dict[str, Tensor]]]:
        """Record an expert's predictions; each call then compares the model's at its current weights.

        It returns the mean KL(expert || model) over the predictions on the expert's examples, in nats, and
        its gradients with respect to every learned parameter.
        """

    def keep(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors, in a file instead of memory."""

    @property
    def originals(self) -> TaskVectors:
        """The experts' own task vectors."""

    def routers(self) -> Sequence[Router]:
        """The routers of mixtures of experts that an expert changes, in the network's order."""

    def merge_of(self, task_vectors: TaskVectors, scale: float) -> AbstractContextManager[object]:
        """In this context the model is base + scale * sum of these task vectors."""

    def write(self, name: str, weight: Tensor) -> None:
        """Replace one weight of that model."""

    def router_states(self, router: Router) -> Sequence[Tensor]:
        """Inputs [R, H] of a router in that model, on some tokens of every expert's examples."""


@dataclass(frozen=True)
class Informed(Preprocess):
    """New task vectors from old ones and statistics on calibration examples. No label is read."""

    @override
    def __call__(self, task_vectors: TaskVectors) -> Iterator[tuple[str, Tensor]]:
        raise TypeError(f"{type(self).__name__} needs calibration examples: use it in a fit")

    def changes(self, task_vectors: TaskVectors, calibrator: Calibrator) -> Sequence[str]:
        """The parameters that `informed` yields; others keep their task vectors."""
        del calibrator
        return list(task_vectors.deltas)

    @abstractmethod
    def informed(self, task_vectors: TaskVectors, calibrator: Calibrator) -> Iterator[tuple[str, Tensor]]:
        """The name of every one of `changes` and its K new differences [K, *S], in that order."""
