"""Packed experts of the demo: bits per weight and task against the kept share of the experts' scores."""

import contextlib
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean

import trainmerge as tm
from tests.bench.__main__ import figure
from tests.bench.guard import trainmerge
from trainmerge.run.folder import RunFolder
from trainmerge.run.open_run import read_run
from trainmerge.system.console import progress

TEXTS = 200  # of each task's test texts
EXACT = "budget 6"  # room for five models
FORMS = {
    EXACT: tm.PackedForm(budget="6", dtype="float32"),
    **{codec: tm.PackedForm(codec) for codec in ("mask", "emr", "ternary", "ternary:0.05", "pca:1", "pca:3")},
    **{f"lowrank:{rank}": tm.PackedForm(f"lowrank:{rank}") for rank in (1, 2, 4, 8)},
    "budget 1.005": tm.PackedForm(budget="1.005"),
}


def measure(run: Path, form: tm.PackedForm) -> dict[str, float]:
    """Bits, mean relative error, and every packed expert's accuracy on test texts of its own task."""
    recipe = read_run(RunFolder(run))[0]
    with tempfile.TemporaryDirectory() as folder:
        packed = tm.export_packed(run, f"{folder}/packed", form)
        opened = tm.open_packed(packed)
        found = {"bits": opened.bits, "error": mean(opened.errors.values())}
        for task, expert in recipe.experts.items():
            checkpoint = tm.unpack(packed, task, f"{folder}/{task}")
            alone = replace(recipe, experts={task: expert})
            scores = tm.evaluate_checkpoint(checkpoint, alone, TEXTS, max_length=64)
            (found[task],) = scores.means().values()
    return found


def kept(found: dict[str, float], experts: dict[str, float]) -> float:
    """The mean over the tasks of the share of the expert's accuracy."""
    return mean(found[task] / experts[task] for task in experts if task not in ("bits", "error"))


def report(found: dict[str, dict[str, float]], exact: str = EXACT, prefix: str = "") -> None:
    """Print the figures of every form."""
    experts = found[exact]
    for name, own in found.items():
        key = prefix + name.replace(" ", "_").replace(":", "_")
        figure(f"bits_{key}", own["bits"], "bits per weight and task", "")
        figure(f"error_{key}", own["error"], "relative error", "")
        figure(f"kept_{key}", kept(own, experts), "of the experts' accuracy", "")


def main() -> None:
    """Fit the demo's recipe, pack its experts in every way, and score them."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        run = Path(folder) / "demo"
        trainmerge("fit", "--config", "configs/demo.yaml", "--run", str(run), "--report", "false")
        found = {name: measure(run, FORMS[name]) for name in progress(list(FORMS), "packed")}
    report(found)


if __name__ == "__main__":
    main()
