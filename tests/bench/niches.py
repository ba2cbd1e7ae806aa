"""Searches without gradients on the demo: niches against CMA-ES, by evaluations.

The score is the accuracy on the first test examples of each task, used as validation files: a race, not a
measure of what the merges are worth on other texts.
"""

import contextlib
import json
import sys
import tempfile
from itertools import accumulate
from pathlib import Path
from statistics import mean

from tests.bench.__main__ import figure
from tests.bench.demo_scores import scored_demo
from trainmerge.tradeoffs.cma_es import Search
from trainmerge.tradeoffs.niches import Niches
from trainmerge.tradeoffs.search import search_config
from trainmerge.tradeoffs.space import Over

SEEDS = (0,)
EVALUATIONS = 60
EXAMPLES = 20  # per task, of five
SEARCHES: dict[str, tuple[Over, type[Search] | type[Niches]]] = {
    "niches": ("coefficients", Niches),
    "cma_es_coefficients": ("coefficients", Search),
    "cma_es_experts": ("experts", Search),
}


def main() -> None:
    """Each search with each seed; the best score after half and after all evaluations, means over seeds."""
    with tempfile.TemporaryDirectory() as folder:
        config = scored_demo(Path(folder))
        best = {name: [course(config, Path(folder), name, seed) for seed in SEEDS] for name in SEARCHES}
    for name, courses in best.items():
        for count in (EVALUATIONS // 2, EVALUATIONS):
            figure(f"{name}_after_{count}", mean(own[count - 1] for own in courses), "accuracy", "")
    for rival in ("cma_es_coefficients", "cma_es_experts"):
        pairs = zip(best["niches"], best[rival], strict=True)
        won = sum(niches[EVALUATIONS // 2 - 1] >= other[-1] for niches, other in pairs)
        figure(f"niches_in_half_of_{rival}", won, f"of {len(SEEDS)} seeds", "")


def course(config: Path, folder: Path, name: str, seed: int) -> list[float]:
    """The best score so far after each evaluation."""
    over, kind = SEARCHES[name]
    run = folder / f"{name}-{seed}"
    with contextlib.redirect_stdout(sys.stderr):
        search_config(config, run, "accuracy", over=over, search=kind(EVALUATIONS, seed=seed), limit=EXAMPLES)
    lines = (run / "search.jsonl").read_text().splitlines()[1:]
    return list(accumulate((json.loads(line)["score"] for line in lines), max))


if __name__ == "__main__":
    main()
