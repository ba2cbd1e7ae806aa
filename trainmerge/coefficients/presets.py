"""Published rules for coefficients without learning: starting points, or complete merges.

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
from trainmerge.data.examples import Columns, Example
from trainmerge.data.text_files import load_examples
from trainmerge.system.ranges import check_fields


@dataclass(frozen=True)
class Preset(ABC):
    """Coefficients from a rule."""

    @abstractmethod
    def __call__(self, experts: Sequence[str], layout: Layout) -> Tensor:
        """The coefficients, [K, 1] or [K, G]."""


@dataclass(frozen=True)
class LayerSwap(Preset):
    """One expert's lowest and highest blocks, the other's middle blocks: coefficients 1 and 0.

    Bandarkar et al., ICLR 2025 (arXiv 2410.01335), which swaps the layers of a language expert into a maths
    expert of 32 layers. Blocks are the numbered ones; parameters outside them (embeddings, final norm) are
    the outer expert's.

    Args:
        outer: The expert of the lowest and the highest blocks (the paper's language expert).
        inner: The expert of the middle blocks.
        bottom: Number of lowest blocks.
        top: Number of highest blocks.
        transition: Number of blocks at each border with coefficient 1/2 for both.
    """

    outer: str
    inner: str
    bottom: int = 5
    top: int = 2
    transition: int = 1

    def __post_init__(self) -> None:
        check_fields(self, bottom="[0, inf)", top="[0, inf)", transition="[0, inf)")

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
    """Checkpoints of one run, weighted by a metric: w_k = m_k^power, or m_k^-power, normalised to sum to 1.

    Metrics-weighted averaging (arXiv 2504.18580) weights by training loss or step with one exponent. We found
    no exact formula, so this one is ours. Power 0 is the average; a higher one favours the best.

    Args:
        metrics: Expert -> its metric, above 0.
        power: The exponent.
        best: Whether the `lowest` metric is best (a loss) or the `highest` (a step, a score).
    """

    metrics: Mapping[str, float]
    power: float = 1.0
    best: Literal["lowest", "highest"] = "lowest"

    def __post_init__(self) -> None:
        check_fields(self, metrics="(0, inf)", power="[0, inf)")

    @override
    def __call__(self, experts: Sequence[str], layout: Layout) -> Tensor:
        if set(self.metrics) != set(experts) or min(self.metrics.values()) <= 0:
            raise ValueError(f"MetricsWeighted needs a metric above 0 for each of {list(experts)}")
        sign = -1 if self.best == "lowest" else 1
        logs = torch.tensor([log(self.metrics[name]) for name in experts], dtype=torch.float64)
        return (sign * self.power * logs).softmax(dim=0).float()[:, None]


class Measures(Protocol):
    """The statistics that `trainmerge.model.expert_statistics` gives to a preset."""

    def likelihoods(self, expert: int, texts: Sequence[Example]) -> Tensor:
        """Log-likelihood of each text under the expert, [N] float64."""

    def divergences(self, expert: int, texts: Sequence[Example]) -> Tensor:
        """Mean Jensen-Shannon divergence of base and expert on each text, [N] float64, in nats."""


@dataclass(frozen=True)
class MeasuredPreset(Preset):
    """Coefficients from the experts' predictions on unlabeled texts, before the fit.

    Args:
        texts: File of texts from the target domain, read as calibration files are.
        max_texts: Use the first so many.
    """

    texts: str
    max_texts: int = 64

    @override
    def __call__(self, experts: Sequence[str], layout: Layout) -> Tensor:
        """Uniform, as a placeholder until `measured`."""
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
    def measured(self, experts: Sequence[str], measure: Measures) -> Tensor:
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
class T3(MeasuredPreset):
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
    def measured(self, experts: Sequence[str], measure: Measures) -> Tensor:
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
