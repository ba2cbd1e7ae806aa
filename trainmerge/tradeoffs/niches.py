"""Natural niches (M2N2, arXiv 2508.16204) over coefficients: a population that shares what it solves.

A genome is a matrix of coefficients, with a score for each example. Examples that many genomes solve are
worth less to each of them, so that those with rare skills stay; parents are chosen to complement each other.

Its state is a function of the seed and the scores, which are logged one genome per line. A search resumes by
replaying the log, bit for bit.

Legend: `P` genomes of the archive, `N` examples, `K` experts, `G` coefficient groups.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from trainmerge.system.atomic import append_line
from trainmerge.system.ranges import check_fields
from trainmerge.tradeoffs.cma_es import Tried, read_log


@dataclass(frozen=True)
class Niches:
    """How to search.

    Args:
        evaluations: Number of merges to score, including the first ones: the start, and each expert alone.
        population: Genomes in the archive; 20 in the paper.
        alpha: Competition for examples; 0 is a plain genetic algorithm, 1 the paper's niches.
        seed: Seed of the draws.
    """

    evaluations: int = 100
    population: int = 20
    alpha: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(
            self, "niches", evaluations="[1, inf)", population="[2, inf)", alpha="[0, inf)", seed="[0, inf)"
        )


@dataclass(frozen=True)
class Genome(Tried):
    """Coefficients [K * G] and their scores; `score` is the mean over the examples."""

    scores: Sequence[float] = ()  # N, each 0 or more


def fitness(scores: Tensor, alpha: float) -> Tensor:
    """f_i = sum_j s_ij / (sum_l s_lj)^alpha, [P, N] -> [P]; an example that nobody solves counts 0."""
    return shared(scores, alpha).sum(dim=1)


def attraction(scores: Tensor, first: int, alpha: float) -> Tensor:
    """What each genome adds to the first: sum_j max(0, s_ij - s_1j) / (sum_l s_lj)^alpha, [P, N] -> [P]."""
    own = shared(scores, alpha)
    return (own - own[first]).clamp_min(0).sum(dim=1)


def shared(scores: Tensor, alpha: float) -> Tensor:
    """Each score over what all genomes have at its example, [P, N]."""
    total = scores.sum(dim=0)
    return scores * torch.where(total > 0, total.clamp_min(1e-300) ** -alpha, 0.0)


def evolve(
    score: Callable[[Sequence[float]], Sequence[float]],
    starts: Sequence[Sequence[float]],
    order: Sequence[int],
    niches: Niches,
    log: Path,
    depends_on: object = None,
) -> Iterator[Genome]:
    """Genomes with their scores: the starts, then one child after another; each is logged at once.

    A child is w times the first parent and 1 - w times the second up to a random border between groups, and
    the other way round after it. (The paper interpolates on the sphere, where the base would not keep its
    coefficient 1.) It replaces the least fit, itself perhaps.

    Args:
        score: A genome -> its score on each example, N numbers.
        starts: The first genomes.
        order: The G groups in the network's order.
        niches: Settings.
        log: Genomes in it are not scored again.
        depends_on: JSON data stored in the log's header.

    Raises:
        ValueError: the log is from a different search.
    """
    settings = {k: v for k, v in asdict(niches).items() if k != "evaluations"}
    header = {**settings, "method": "niches", "starts": [list(x) for x in starts], "order": list(order)}
    scored = _Logged(score, log, read_log(log, {**header, "depends_on": depends_on}, Genome))
    dice, archive = Random(niches.seed), list[Genome]()
    while scored.count < niches.evaluations:
        born = scored.count
        x = starts[born] if born < len(starts) else _child(archive, order, niches.alpha, dice)
        archive.append(scored(x))
        yield archive[-1]
        if len(archive) > niches.population:
            del archive[int(fitness(_table(archive), niches.alpha).argmin())]


def _child(archive: Sequence[Genome], order: Sequence[int], alpha: float, dice: Random) -> list[float]:
    scores = _table(archive)
    first = _draw(fitness(scores, alpha), dice)
    wanted = attraction(scores, first, alpha)
    wanted[first] = 0
    if not bool(wanted.any()):
        wanted = torch.ones_like(wanted).index_fill_(0, torch.tensor(first), 0.0)
    second = _draw(wanted, dice)
    weight, border = dice.random(), dice.randint(0, len(order))
    return mixed(archive[first].x, archive[second].x, order, weight, border)


def mixed(
    first: Sequence[float], second: Sequence[float], order: Sequence[int], weight: float, border: int
) -> list[float]:
    """Two genomes [K * G] -> their child: `weight` of the first in the groups before the border."""
    one, other = (torch.tensor(x, dtype=torch.float64).view(-1, len(order)) for x in (first, second))
    share = torch.full((len(order),), 1 - weight, dtype=torch.float64)
    share[list(order[:border])] = weight
    found: list[float] = (share * one + (1 - share) * other).flatten().tolist()
    return found


def _table(archive: Sequence[Genome]) -> Tensor:
    return torch.tensor([genome.scores for genome in archive], dtype=torch.float64)


def _draw(weights: Tensor, dice: Random) -> int:
    """A number with a probability in proportion to its weight; any, if all are zero."""
    chances = weights.tolist() if bool(weights.any()) else [1.0] * len(weights)
    return dice.choices(range(len(chances)), chances)[0]


class _Logged:
    """Scores genomes in order: the first ones are read from the log, the others are added to it."""

    def __init__(
        self, score: Callable[[Sequence[float]], Sequence[float]], log: Path, known: Sequence[Genome]
    ) -> None:
        self.score, self.log, self.known = score, log, known
        self.count = 0

    def __call__(self, x: Sequence[float]) -> Genome:
        if self.count < len(self.known):
            found = self.known[self.count]
            if list(found.x) != list(x):
                raise ValueError(f"{self.log} is from another version: remove it to begin again")
        else:
            scores = [float(value) for value in self.score(x)]
            if min(scores, default=0.0) < 0:
                raise ValueError("niches need scores of 0 or more for each example")
            found = Genome(list(x), sum(scores) / max(1, len(scores)), scores)
            append_line(self.log, json.dumps(asdict(found)), durable=True)
        self.count += 1
        return found
