"""Published ways to choose coefficients without learning them: starting points, and merges of their own.

Legend: `K` experts, `G` coefficient groups, `N` texts.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Literal, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.coefficients.layout import Layout
from trainmerge.data.examples import Columns, Example, load_examples


@dataclass(frozen=True)
class Preset(ABC):
    """Coefficients from a rule."""

    @abstractmethod
    def __call__(self, experts: Sequence[str], layout: Layout) -> Tensor:
        """The coefficients, [K, 1] or [K, G]."""


@dataclass(frozen=True)
class LayerSwap(Preset):
    """One expert below and above, the other between: the outer one's coefficient is 1 there, and 0 here.

    Bandarkar et al., ICLR 2025 (arXiv 2410.01335), which swaps the layers of a language expert into a maths
    expert of 32 layers. Blocks are the numbered ones; what lies outside of them (embeddings, final norm) is
    the outer expert's.

    Args:
        outer: The expert of the lowest and the highest blocks (the paper's language expert).
        inner: The expert of the blocks between.
        bottom: Blocks below.
        top: Blocks above.
        transition: Blocks at each border that are half one and half the other.
    """

    outer: str
    inner: str
    bottom: int = 5
    top: int = 2
    transition: int = 1

    @override
    def __call__(self, experts: Sequence[str], layout: Layout) -> Tensor:
        if unknown := {self.outer, self.inner} - set(experts):
            raise ValueError(f"LayerSwap: no expert {sorted(unknown)}; there are {list(experts)}")
        depth = 1 + max(
            (number for name in layout.groups if (number := _number(name)) is not None), default=-1
        )
        if self.bottom + self.top + 2 * self.transition > depth:
            raise ValueError(f"LayerSwap: {depth} blocks are too few for {self}")
        shares: dict[int, float] = {}  # of the outer expert
        for name, groups in layout.groups.items():
            share = self._outer_share(_number(name), depth)
            if any(shares.setdefault(group, share) != share for group in groups):
                raise ValueError("LayerSwap needs one coefficient per block, or a finer grouping")
        outer = torch.tensor([shares[group] for group in range(len(layout.labels))])
        values = torch.zeros(len(experts), len(layout.labels))
        values[experts.index(self.outer)] = outer
        values[experts.index(self.inner)] += 1 - outer
        return values

    def _outer_share(self, block: int | None, depth: int) -> float:
        if block is None or block < self.bottom or block >= depth - self.top:
            return 1.0
        inner = range(self.bottom + self.transition, depth - self.top - self.transition)
        return 0.0 if block in inner else 0.5


def _number(name: str) -> int | None:
    """The block that a parameter is in: its name's first number."""
    found = re.search(r"\.(\d+)\.", f".{name}")
    return int(found.group(1)) if found else None


@dataclass(frozen=True)
class MetricsWeighted(Preset):
    """Checkpoints of one run, weighed by a metric: w_k = m_k^power, or m_k^-power, shared out to sum to 1.

    Metrics-weighted averaging (arXiv 2504.18580) weighs by training loss or step with one exponent; its exact
    formula was not to be found, so this one is ours. 0 is the average; more prefers the best.

    Args:
        metrics: Expert -> its metric, above 0.
        power: The exponent.
        best: Whether the `lowest` metric is best (a loss), or the `highest` (a step, a score).
    """

    metrics: Mapping[str, float]
    power: float = 1.0
    best: Literal["lowest", "highest"] = "lowest"

    @override
    def __call__(self, experts: Sequence[str], layout: Layout) -> Tensor:
        if set(self.metrics) != set(experts) or min(self.metrics.values()) <= 0:
            raise ValueError(f"MetricsWeighted needs a metric above 0 for each of {list(experts)}")
        sign = -1 if self.best == "lowest" else 1
        logs = torch.tensor([log(self.metrics[name]) for name in experts], dtype=torch.float64)
        return (sign * self.power * logs).softmax(dim=0).float()[:, None]


class Measures(Protocol):
    """What `trainmerge.model.expert_statistics` offers to a preset."""

    def likelihoods(self, expert: int, texts: Sequence[Example]) -> Tensor:
        """Log-likelihood of each text under the expert, [N] float64."""

    def divergences(self, expert: int, texts: Sequence[Example]) -> Tensor:
        """Mean Jensen-Shannon divergence of base and expert on each text, [N] float64, in nats."""


@dataclass(frozen=True)
class MeasuredPreset(Preset):
    """Coefficients from what the experts say about unlabeled texts, before the fit.

    Args:
        texts: File of texts of the domain that the merge is for, read as calibration files are.
        max_texts: The first so many.
    """

    texts: str
    max_texts: int = 64

    @override
    def __call__(self, experts: Sequence[str], layout: Layout) -> Tensor:
        """Even, until `measured` says more."""
        return torch.full((len(experts), 1), 1 / len(experts))

    @abstractmethod
    def measured(self, experts: Sequence[str], measure: Measures) -> Tensor:
        """The coefficients, [K, 1]."""

    def read(self) -> list[Example]:
        """The texts."""
        column = Columns().text
        return [Example(text) for text in load_examples(self.texts, [column])[column][: self.max_texts]]


@dataclass(frozen=True)
class DomainPosterior(MeasuredPreset):
    """How likely each expert's domain is, given texts of the one that the merge is for.

    Branch-Train-Merge (Li et al., arXiv 2208.03306): p(k | x) is in proportion to p(x | k) p(k); the prior
    starts even and moves by `rate` towards each text's posterior; what it ends at are the coefficients, so
    the last few texts decide most. For language models.

    Args:
        rate: Of the moving average; 0.3 in the paper.
    """

    rate: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1 or self.max_texts < 1:
            raise ValueError("DomainPosterior needs a rate in (0, 1] and at least one text")

    @override
    def measured(self, experts: Sequence[str], measure: Measures) -> Tensor:
        texts = self.read()
        likelihoods = torch.stack([measure.likelihoods(k, texts) for k in range(len(experts))])
        return posterior(likelihoods, self.rate)[:, None]


def posterior(likelihoods: Tensor, rate: float) -> Tensor:
    """Log-likelihoods [K, N] -> [K], in float32: the prior after all texts, which starts even."""
    prior = torch.full((len(likelihoods),), 1 / len(likelihoods), dtype=torch.float64)
    for column in likelihoods.T:
        seen = (column.double() + prior.log()).softmax(dim=0)
        prior = (1 - rate) * prior + rate * seen
    return prior.float()


@dataclass(frozen=True)
class T3(MeasuredPreset):
    """One expert and its base: the more they disagree about the texts, the more of the expert.

    T3 (arXiv 2510.27265), one batch at a time: the mean over texts of `t3_coefficients`. One coefficient
    per text needs one merge per text, which no checkpoint can hold; call the function for those.

    Args:
        low: Coefficient where they agree.
        high: Coefficient where they do not.
        gamma: Steepness; 0.5 in the paper.
        centred: False is the paper's formula, of which divergences reach only the range 0.50 to 0.59.
    """

    low: float = 0.0
    high: float = 1.0
    gamma: float = 0.5
    centred: bool = True

    @override
    def measured(self, experts: Sequence[str], measure: Measures) -> Tensor:
        if len(experts) != 1:
            raise ValueError(f"T3 weighs one expert against its base; these are {len(experts)}")
        coefficients = t3_coefficients(
            measure.divergences(0, self.read()), self.low, self.high, self.gamma, self.centred
        )
        return coefficients.mean().float().view(1, 1)


def t3_coefficients(
    divergences: Tensor, low: float = 0.0, high: float = 1.0, gamma: float = 0.5, centred: bool = True
) -> Tensor:
    """Low + (high - low) sigmoid(gamma x) of Jensen-Shannon divergences [N], in nats.

    x is the divergence as in the paper, or, centred, on a scale where no disagreement is -1 and all is 1.
    """
    x = 2 * divergences / log(2) - 1 if centred else divergences
    return low + (high - low) * torch.sigmoid(gamma * x)
