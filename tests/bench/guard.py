"""The demo's recipe against the best uniform coefficient: at its end, and after 200 steps more."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.__main__ import figure

MORE_STEPS = 200
ALONE = "--model.objective.init_args.agreement=0"
OTHERS = {
    "plain": (),
    "diversity": ("--model.objective.init_args.diversity=1",),
    "box": ("--model.constraint=trainmerge.Box",),
    "anchor": ("--model.anchor.weight=1", "--model.anchor.power=2"),
    "scaled": (
        "--model.optimizer=tests.bench.scaled_steps.ScaledAdam",
        "--model.optimizer.init_args.lr=0.05",
    ),
    "slow": ("--model.optimizer.init_args.lr=0.005",),
}


def trainmerge(*arguments: str) -> None:
    """Run one command; its output goes to stderr, where figures are not."""
    subprocess.run([sys.executable, "-m", "trainmerge.cli", *arguments], check=True, stdout=sys.stderr)


def learned(run: str, *options: str) -> float:
    """Fit the demo's recipe with some options, and the merge's mean accuracy."""
    trainmerge("fit", "--config", "configs/demo.yaml", "--run", run, "--report", "false", *options)
    trainmerge("evaluate", run, "--compare", "false")
    return float(json.loads(Path(run, "scores.json").read_text())["learned"]["mean"])


def main() -> None:
    """Fit, score, go on, score again; then other guards in its place."""
    with tempfile.TemporaryDirectory() as folder:
        run = f"{folder}/demo"
        trainmerge("fit", "--config", "configs/demo.yaml", "--run", run, "--report", "false")
        trainmerge("evaluate", run)
        scores = json.loads(Path(run, "scores.json").read_text())
        (best,) = (row["mean"] for name, row in scores.items() if name.startswith("task arithmetic"))
        figure("guard_best_uniform", best, "accuracy", "")
        figure("guard_experts", scores["expert"]["mean"], "accuracy", "")
        figure("guard_gain", scores["learned"]["mean"] - best, "accuracy", "> 0")
        steps = max(int(path.stem[5:]) for path in Path(run, "checkpoints").iterdir())
        later = learned(run, f"--trainer.max_steps={steps + MORE_STEPS}")
        figure(f"guard_gain_{MORE_STEPS}_steps_later", later - best, "accuracy", "> 0")
        for name, options in OTHERS.items():
            gain = learned(f"{folder}/{name}", ALONE, *options) - best
            figure(f"{name}_entropy_gain", gain, "accuracy", "")


if __name__ == "__main__":
    main()
