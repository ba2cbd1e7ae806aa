"""What `trainmerge pareto` prints."""

from typing import Any

from trainmerge.tables import print_table
from trainmerge.tradeoffs.pareto import pareto_run


def print_front(run: str, *settings: Any) -> None:
    """Make the front, and print its points and how far it can be trusted."""
    content = pareto_run(run, *settings)
    tasks = content["tasks"]
    rows = [["run", *(f"{content['run'][task]:.4f}" for task in tasks), *["1.00"] * len(tasks)]]
    rows += [
        [
            str(entry["point"]),
            *(f"{entry['losses'][task]:.4f}" for task in tasks),
            *(f"{entry['scales'][task]:.2f}" for task in tasks),
        ]
        for entry in content["front"]
    ]
    scales = [f"x {task}" for task in tasks]
    print_table("losses on the front, and the experts' scales", ["point", *tasks, *scales], rows)
    checks = content["checks"]
    fit = [[task, *(f"{checks[task][name]:.3f}" for name in ("rank_correlation", "r2"))] for task in tasks]
    print_table("unseen merges: predicted against measured", ["task", "rank correlation", "R2"], fit)
    print(f"next: trainmerge report {run}   draws the front")
    print(f"      trainmerge pareto {run} --export POINT --out OUT")
