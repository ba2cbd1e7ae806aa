"""Published rules that measure the models on unlabeled examples: starting points, or complete merges.

Legend: `K` experts, `G` coefficient groups, `N` texts, `n` inputs of a linear layer.
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.coefficients.layout import Layout
from trainmerge.coefficients.presets import Preset
from trainmerge.data.columns import Columns
from trainmerge.data.examples import Example
from trainmerge.data.text_files import load_examples
from trainmerge.system.ranges import check_fields
from trainmerge.task_vectors.delta import TaskVectors


class BlockError(Protocol):
    """How far one block's outputs are from each expert's."""

    def __call__(self, weights: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """sum_k w_k |f - Y_k|^2 per row with these weights, and its gradient for each of them."""


class Measures(Protocol):
    """The statistics that `trainmerge.model.expert_statistics` gives to a preset."""

    @property
    def task_vectors(self) -> TaskVectors:
        """What the coefficients scale."""

    @property
    def originals(self) -> TaskVectors:
        """The experts' own task vectors."""

    @property
    def weights(self) -> Sequence[float]:
        """The tasks' weights, K."""

    def grams(self, expert: int, names: Sequence[str], merged: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean x x^T [n, n] of the inputs x of each linear layer among `names`; see `Calibrator`."""

    def in_order(self, names: Iterable[str]) -> list[str]:
        """These parameters in the network's order."""

    def shifted(
        self, expert: int, names: Sequence[str], values: Tensor
    ) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Mean x x^T, (y - x) x^T and (y - x) (y - x)^T, [n, n] each, of the layers among `names`.

        y are the expert's inputs on its own examples, x those of the merge with coefficients `values` [K, G].
        """

    def block(self, names: Sequence[str], values: Tensor) -> BlockError | None:
        """The error of the block of these parameters, by their weights; None if no example reaches it.

        Its inputs are those in the merge with coefficients `values` [K, G], its targets the experts' outputs.
        """

    def likelihoods(self, expert: int, texts: Sequence[Example]) -> Tensor:
        """Log-likelihood of each text under the expert, [N] float64."""

    def divergences(self, expert: int, texts: Sequence[Example]) -> Tensor:
        """Mean Jensen-Shannon divergence of base and expert on each text, [N] float64, in nats."""


@dataclass(frozen=True)
class MeasuredPreset(Preset):
    """Coefficients from measuring the models, before the fit."""

    @override
    def __call__(self, experts: Sequence[str], layout: Layout) -> Tensor:
        """Uniform, as a placeholder until `measured`."""
        return torch.full((len(experts), 1), 1 / len(experts))

    @abstractmethod
    def measured(self, experts: Sequence[str], layout: Layout, measure: Measures) -> Tensor:
        """The coefficients, [K, 1] or [K, G]."""


@dataclass(frozen=True)
class TextPreset(MeasuredPreset):
    """Coefficients from the experts' predictions on texts of the target domain.

    Args:
        texts: File of texts from the target domain, read as calibration files are.
        max_texts: Use the first so many.
    """

    texts: str
    max_texts: int = 64

    def read(self) -> list[Example]:
        """The texts."""
        (column,) = Columns().names()
        return [Example(text) for text in load_examples(self.texts, [column])[column][: self.max_texts]]


@dataclass(frozen=True)
class DomainPosterior(TextPreset):
    """The posterior of each expert's domain, given texts from the target domain.

    Branch-Train-Merge (Li et al., arXiv 2208.03306): p(k | x) is proportional to p(x | k) p(k). The prior
    starts uniform and moves by `rate` towards each text's posterior; its final value gives the coefficients,
    so the last few texts have the most weight. For language models.

    Args:
        rate: Rate of the moving average; 0.3 in the paper.
    """

    rate: float = 0.3

    def __post_init__(self) -> None:
        check_fields(self, rate="(0, 1]", max_texts="[1, inf)")

    @override
    def measured(self, experts: Sequence[str], layout: Layout, measure: Measures) -> Tensor:
        texts = self.read()
        likelihoods = torch.stack([measure.likelihoods(k, texts) for k in range(len(experts))])
        return posterior(likelihoods, self.rate)[:, None]


def posterior(likelihoods: Tensor, rate: float) -> Tensor:
    """Log-likelihoods [K, N] -> [K], in float32: the prior after all texts, starting uniform."""
    prior = torch.full((len(likelihoods),), 1 / len(likelihoods), dtype=torch.float64)
    for column in likelihoods.T:
        seen = (column.double() + prior.log()).softmax(dim=0)
        prior = (1 - rate) * prior + rate * seen
    return prior.float()


@dataclass(frozen=True)
class T3(TextPreset):
    """One expert and its base: the coefficient grows with their disagreement on the texts.

    T3 (arXiv 2510.27265), one batch at a time: the mean over texts of `t3_coefficients`. One coefficient per
    text needs one merge per text, which a single checkpoint cannot represent; call the function for those.

    Args:
        low: Coefficient at full agreement.
        high: Coefficient at full disagreement.
        gamma: Steepness; 0.5 in the paper.
        centred: False is the paper's formula, of which divergences reach only the range 0.50 to 0.59.
    """

    low: float = 0.0
    high: float = 1.0
    gamma: float = 0.5
    centred: bool = True

    def __post_init__(self) -> None:
        check_fields(self, gamma="[0, inf)", max_texts="[1, inf)")

    @override
    def measured(self, experts: Sequence[str], layout: Layout, measure: Measures) -> Tensor:
        if len(experts) != 1:
            raise ValueError(f"T3 weights one expert against its base; the recipe has {len(experts)}")
        coefficients = t3_coefficients(
            measure.divergences(0, self.read()), self.low, self.high, self.gamma, self.centred
        )
        return coefficients.mean().float().view(1, 1)


def t3_coefficients(
    divergences: Tensor, low: float = 0.0, high: float = 1.0, gamma: float = 0.5, centred: bool = True
) -> Tensor:
    """Low + (high - low) sigmoid(gamma x) of Jensen-Shannon divergences [N], in nats.

    x is the divergence as in the paper, or, centred, on a scale from -1 (none) to 1 (maximal).
    """
    x = 2 * divergences / log(2) - 1 if centred else divergences
    return low + (high - low) * torch.sigmoid(gamma * x)
