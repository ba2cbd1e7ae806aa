"""Closed forms on the demo's adapters, in one process: minutes, where `make suite-closed` takes hours.

Accuracies on the first test texts of each task; nothing is chosen by them.
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.__main__ import figure
from tests.bench.demo_scores import scored_demo
from tests.closed_methods import METHODS, Steps
from trainmerge.fitting.from_config import from_config
from trainmerge.tradeoffs.scores import make_score

EXAMPLES = 80  # per task, of five
FORMS = (
    "ties", "tsv-m", "aswudi", "localize", "ram", "ram+", "magmax", "della", "sce", "iso-c", "iso-cts",
    "svc", "svc-tsv", "tsv-energy", "karcher", "knots", "pico", "core-space", "aim-ties",
)  # fmt: skip
SCALES = (0.3, 0.4)  # of task arithmetic


def main() -> None:
    """Score each; task arithmetic too."""
    with tempfile.TemporaryDirectory() as folder:
        config = scored_demo(Path(folder))
        for scale in SCALES:
            figure(f"task_arithmetic_{scale}", score(config, Path(folder), (), scale), "accuracy", "")
        for name in FORMS:
            method = METHODS[name]
            figure(name, score(config, Path(folder), method.steps, method.coefficient), "accuracy", "")


def score(config: Path, folder: Path, steps: Steps, coefficient: float) -> float:
    """The mean accuracy of a merge over the five tasks."""
    methods = [{"class_path": f"trainmerge.{kind}", "init_args": given} for kind, given in steps]
    changes: dict[str, Any] = {
        "recipe.preprocess": methods, "model.initial": coefficient, "trainer.max_steps": 0,
        "data.max_examples": 32
    }  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        settings = from_config(config, folder / f"run-{abs(hash(json.dumps(methods)))}", changes)
        settings.module.load(settings.data)
        settings.module.resident.merged.materialise()
        return make_score("accuracy", {}, settings.module, settings.data, EXAMPLES)()


if __name__ == "__main__":
    main()
