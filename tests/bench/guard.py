"""The demo's recipe against the best uniform coefficient: at its end, and after 200 steps more."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.__main__ import figure

MORE_STEPS = 200


def trainmerge(*arguments: str) -> None:
    """Run one command; its output goes to stderr, where figures are not."""
    subprocess.run([sys.executable, "-m", "trainmerge.cli", *arguments], check=True, stdout=sys.stderr)


def main() -> None:
    """Fit, score, go on, score again; all on the full test sets."""
    with tempfile.TemporaryDirectory() as folder:
        run = f"{folder}/demo"
        trainmerge("fit", "--config", "configs/demo.yaml", "--run", run)
        trainmerge("evaluate", run)
        scores = json.loads(Path(run, "scores.json").read_text())
        (best,) = (row["mean"] for name, row in scores.items() if name.startswith("task arithmetic"))
        steps = max(int(path.stem[5:]) for path in Path(run, "checkpoints").iterdir())
        trainmerge(
            "fit", "--config", "configs/demo.yaml", "--run", run, f"--trainer.max_steps={steps + MORE_STEPS}"
        )
        trainmerge("evaluate", run, "--compare", "false")
        later = json.loads(Path(run, "scores.json").read_text())["learned"]["mean"]
    figure("guard_best_uniform", best, "accuracy", "")
    figure("guard_gain", scores["learned"]["mean"] - best, "accuracy", "> 0")
    figure(f"guard_gain_{MORE_STEPS}_steps_later", later - best, "accuracy", "> 0")
    figure("guard_experts", scores["expert"]["mean"], "accuracy", "")


if __name__ == "__main__":
    main()
