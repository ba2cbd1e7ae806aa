"""How far the surrogate of `trainmerge pareto` can be trusted around the demo's merge: unseen merges."""

import contextlib
import sys
import tempfile

from tests.bench.__main__ import figure
from tests.bench.guard import trainmerge
from trainmerge.tradeoffs import pareto_run

EXAMPLES = 32  # an expert
FEWEST, ENOUGH = 6, 16  # merges for a quadratic in five coordinates: the least, and the default
CHECKS = 16  # with 8 a rank or two decide


def main() -> None:
    """Fit the demo's recipe; fit surrogates to few and to more merges; compare on others."""
    with tempfile.TemporaryDirectory() as folder:
        run = f"{folder}/demo"
        trainmerge("fit", "--config", "configs/demo.yaml", "--run", run)
        for points in (FEWEST, ENOUGH):
            with contextlib.redirect_stdout(sys.stderr):
                found = pareto_run(run, points=points, checks=CHECKS, examples=EXAMPLES)
            for name, bar in (("rank_correlation", "0.9"), ("r2", "")):
                worst = min(check[name] for check in found["checks"].values())
                figure(f"surrogate_{name}_{points}_merges", worst, "worst of 5 tasks", bar)
            figure(f"front_points_{points}_merges", len(found["front"]), "points", "")


if __name__ == "__main__":
    main()
