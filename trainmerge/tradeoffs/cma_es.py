"""CMA-ES (Hansen, arXiv 1604.00772; library `cmaes`) for scores without gradients, resumable bit for bit.

Its state is a function of the seed and the scores, which are logged one per line. A search resumes by
replaying the log: no file needs to be unpickled, and the log is readable.

Legend: `n` coordinates.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from trainmerge.system.atomic import append_line, write_whole
from trainmerge.system.json_file import parse_json
from trainmerge.system.ranges import check_fields

DAMAGED = "Remove it to begin the search again."
WORST = 1e30  # replaces non-finite scores; only the order of scores matters


@dataclass(frozen=True)
class Search:
    """How to search.

    Args:
        evaluations: Number of merges to score, including the start.
        spread: Initial standard deviation around the start.
        population: Merges per generation; by default 4 + 3 ln n, rounded down.
        seed: Seed of the draws.
    """

    evaluations: int = 100
    spread: float = 0.2
    population: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(
            self, "search", evaluations="[1, inf)", spread="(0, inf)", population="[1, inf)", seed="[0, inf)"
        )


@dataclass(frozen=True)
class Tried:
    """A point and its score; higher is better."""

    x: Sequence[float]  # n
    score: float


def maximise(
    score: Callable[[Sequence[float]], float],
    start: Sequence[float],
    search: Search,
    log: Path,
    depends_on: object = None,
) -> Iterator[Tried]:
    """Points with their scores: the start, then generation by generation; each is logged at once.

    Points in `log` are not scored again. `depends_on` is JSON data stored in its header.

    Raises:
        ValueError: cmaes is not installed; the log is from a different search.
    """
    try:
        from cmaes import CMA
    except ImportError as error:
        raise ValueError(f"a search needs cmaes ({error}): pip install 'trainmerge[search]'") from error
    mean = np.asarray(start, dtype=np.float64)
    population = search.population or 4 + int(3 * math.log(len(mean)))
    optimizer = CMA(mean, search.spread, seed=search.seed, population_size=max(4, population))
    settings = {k: v for k, v in asdict(search).items() if k != "evaluations"}
    settings["population"] = search.population or 0  # 0 in the log: by default
    known = read_log(log, {**settings, "start": mean.tolist(), "depends_on": depends_on}, Tried)
    scored = LoggedScores(score, log, known)
    yield scored(mean)
    while scored.count < search.evaluations and not optimizer.should_stop():
        generation = []
        for _ in range(optimizer.population_size):
            x = optimizer.ask()
            found = scored(x)
            generation.append((x, -found.score if math.isfinite(found.score) else WORST))
            yield found
            if scored.count == search.evaluations:
                return
        optimizer.tell(generation)


T = TypeVar("T", bound=Tried)


class LoggedScores:
    """Scores points in order: the first ones are read from the log, the others are added to it."""

    def __init__(self, score: Callable[[Sequence[float]], float], log: Path, known: Sequence[Tried]) -> None:
        self.score, self.log, self.known = score, log, known
        self.count = 0  # points so far

    def __call__(self, x: np.ndarray) -> Tried:
        """The point with its score.

        Raises:
            ValueError: the log has another point at this place.
        """
        point: list[float] = x.tolist()
        if self.count < len(self.known):
            found = self.known[self.count]
            if found.x != point:
                raise ValueError(
                    f"{self.log} is from another version of cmaes or numpy: remove it to begin again"
                )
        else:
            found = Tried(point, self.score(point))
            append_line(self.log, json.dumps(asdict(found)), durable=True)
        self.count += 1
        return found


def read_log(log: Path, header: dict[str, Any], kind: type[T]) -> list[T]:
    """The points of a log with this header; a new log gets the header. An incomplete line is dropped.

    Raises:
        ValueError: the log has another header, or is damaged.
    """
    if not log.exists():
        write_whole(log, json.dumps(header) + "\n")
        return []
    first, *lines = log.read_text().splitlines(keepends=True)
    if (made := parse_json(first, log, DAMAGED)) != header:
        before = made if isinstance(made, dict) else {}
        different = [key for key in header if before.get(key) != header[key]]
        raise ValueError(
            f"{log} is from a different search: {different} differ. Undo the change, or use another folder"
        )
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):
        write_whole(log, first + "".join(whole))
    try:
        return [kind(**parse_json(line, log, DAMAGED)) for line in whole]
    except TypeError as error:
        raise ValueError(f"{log}: a line is not a merge of this search: {error}. {DAMAGED}") from error
