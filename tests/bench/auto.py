"""`trainmerge auto` on the demo: what held-out examples say of a merge, and what labels say."""

import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch

import trainmerge as tm
from tests.bench.__main__ import figure
from trainmerge.auto.choice import Choice
from trainmerge.auto.search import AutoSearch
from trainmerge.system.correlation import rank_correlation

CONFIG = Path("configs/demo.yaml")


def main() -> None:
    """Choose, then score the best merge of every row on the test texts."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        clock = time.process_time()
        search = AutoSearch(CONFIG, Path(folder) / "auto", held_out=0.2, minutes=None, memory=None)
        choice = search.choose()
        seconds = time.process_time() - clock
        scores = {name: score(search, choice, name) for name in choice.rows}
    figure("auto_seconds", seconds, "CPU seconds", "")
    for name, trial in choice.rows.items():
        row = name.replace(", ", "_").replace(" ", "_").replace("-", "_").lower()
        figure(f"auto_recovered_{row}", trial.mean, "share", "")
        figure(f"auto_accuracy_{row}", scores[name], "accuracy", "")
    shares = torch.tensor([trial.mean for trial in choice.rows.values()])
    labelled = torch.tensor([scores[name] for name in choice.rows])
    figure("auto_rank_correlation", rank_correlation(shares, labelled), "Spearman", ">= 0.9")
    figure("auto_accuracy_chosen", scores[choice.best], "accuracy", "")
    figure("auto_accuracy_behind_the_best_row", max(scores.values()) - scores[choice.best], "accuracy", "")


def score(search: AutoSearch, choice: Choice, row: str) -> float:
    """Mean accuracy of a row's best merge on the test texts."""
    run = choice.learned.get(row) or search.settle(choice.rows[row])
    return tm.evaluate_run(run, compare=False).means()["learned"]


if __name__ == "__main__":
    main()
