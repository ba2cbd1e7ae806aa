"""What held-out unlabeled examples say of the merges of `trainmerge auto`, and what labels say, by suite.

A suite's rows are `tests/results/SUITE-auto/held-out.json`, as auto.json has them, and their scores on test
data `tests/results/SUITE-auto/labelled.json`; the demo's are figures of `make -s bench ONLY=auto`. A suite
with both files is drawn and listed. This makes them, and goes on where it stopped:

    .venv/bin/python -m tests.held_out_scores SUITE CONFIG
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests import results
from tests.lm_suite import DOCUMENTS
from trainmerge.auto.search import AutoSearch
from trainmerge.evaluate import evaluate_run
from trainmerge.run.config import read_settings
from trainmerge.run.scores import ACCURACY, Metric
from trainmerge.system.correlation import rank_correlation

HELD_OUT = 0.2
LIMITS = {"lm": DOCUMENTS}  # test examples a task; else all
DEMO = "five LoRA experts (demo)"
TITLES = {
    "text": "eight text classifiers",
    "lm": "three language models",
    "embed": "three sentence embedders",
    "vision": "four picture classifiers",
}


class Point(NamedTuple):
    """One merge."""

    row: str
    recovered: float  # of the experts on held-out unlabeled examples: 1 is the expert, 0 the base
    score: float  # on labelled test data


class Judged(NamedTuple):
    """A suite's merges."""

    title: str
    metric: Metric  # of the scores
    points: list[Point]

    @property
    def correlation(self) -> float:
        """Spearman's, of shares and scores; 1 where the best score has the highest share."""
        shares, scores = zip(*((p.recovered, self.metric.sign * p.score) for p in self.points), strict=True)
        return rank_correlation(*torch.tensor([shares, scores], dtype=torch.float64))


def suites() -> list[Judged]:
    """The demo, and every suite whose two files are there."""
    return [demo(), *(found for name in TITLES if (found := suite(name)) is not None)]


def demo() -> Judged:
    """The demo's rows, from the figures of `make bench`."""
    content = json.loads((results.FOLDER / "bench" / "auto.json").read_text())
    values = {row["name"]: row for row in content["figures"]}
    shares = [row for name, row in values.items() if name.startswith("auto_recovered_")]
    points = [
        Point(
            row["what"].partition(",")[0],
            row["value"],
            values[row["name"].replace("recovered", "accuracy", 1)]["value"],
        )
        for row in shares
    ]
    return Judged(DEMO, ACCURACY, points)


def suite(name: str) -> Judged | None:
    """A suite's rows; None if one of its files is not there."""
    rows: dict[str, Any] | None = results.measured(f"{name}-auto/held-out")
    found: dict[str, Any] | None = results.measured(f"{name}-auto/labelled")
    if rows is None or found is None:
        return None
    points = [Point(row, rows[row]["mean"], score) for row, score in found["scores"].items()]
    return Judged(TITLES[name], Metric(found["metric"]), points)


def table() -> str:
    """Markdown: every row of every suite, the highest share first."""
    lines = ["| experts | start | recovered, no labels | on labelled test data |", "|---|---|---|---|"]
    for found in suites():
        title = f"{found.title}: {found.metric.name}, Spearman {found.correlation:.2f}"
        for point in sorted(found.points, key=lambda point: -point.recovered):
            lines.append(f"| {title} | {point.row} | {point.recovered:.3f} | {point.score:.4g} |")
            title = ""
    return "\n".join(lines)


def main() -> None:
    """Choose by `trainmerge auto`, score the best merge of every row, and keep both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("suite", choices=sorted(TITLES))
    parser.add_argument("config", type=Path)
    parser.add_argument("--place", type=Path, help="auto's folder; by default runs/SUITE-auto")
    given = parser.parse_args()
    torch.set_num_threads(1)
    made_by = results.fingerprint(read_settings(given.config))
    search = AutoSearch(given.config, given.place or Path(f"runs/{given.suite}-auto"), HELD_OUT, None, None)
    choice = search.choose()
    results.keep(f"{given.suite}-auto/held-out", made_by, choice.to_json()["rows"])
    scores = {}
    for row, trial in choice.rows.items():
        run = choice.learned.get(row) or search.settle(trial)
        evaluation = evaluate_run(run, LIMITS.get(given.suite), compare=False)
        scores[row] = evaluation.means()["learned"]
        print(f"{row}: recovers {trial.mean:.3f}, scores {scores[row]:.4g}", flush=True)
    content = {"metric": evaluation.metric.name, "scores": scores}
    results.keep(f"{given.suite}-auto/labelled", made_by, content)


if __name__ == "__main__":
    main()
