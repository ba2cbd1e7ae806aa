"""Packed experts of the demo: bits per weight and task against the kept share of the experts' scores."""

import contextlib
import json
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

EXACT = tm.PackedForm(budget="6", dtype="float32")  # room for five models
FORMS = {
    **{codec: tm.PackedForm(codec) for codec in ("mask", "mask:0.4", "emr", "ternary", "ternary:0.05")},
    **{codec: tm.PackedForm(codec) for codec in ("lowrank:1", "lowrank:2", "lowrank:4", "lowrank:8")},
    **{codec: tm.PackedForm(codec) for codec in ("pca:1", "pca:2", "pca:4")},
    **{f"budget {times}": tm.PackedForm(budget=times) for times in ("1.005", "1.01", "1.02", "1.05")},
}


def scores(run: Path, form: tm.PackedForm, place: Path) -> dict[str, float]:
    """Every packed expert's accuracy on the test texts of its own task."""
    recipe = read_run(RunFolder(run))[0]
    packed = tm.export_packed(run, place / "packed", form, overwrite=True)
    found = {}
    for task, expert in recipe.experts.items():
        checkpoint = tm.unpack(packed, task, place / "expert", overwrite=True)
        alone = replace(recipe, experts={task: expert})
        found[task] = next(iter(tm.evaluate_checkpoint(checkpoint, alone, max_length=64).means().values()))
    return found


def main() -> None:
    """Fit the demo's recipe, pack its experts in every way, and score them."""
    measured: list[tuple[str, float, str]] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        run, place = Path(folder) / "demo", Path(folder)
        trainmerge("fit", "--config", "configs/demo.yaml", "--run", str(run))
        experts = scores(run, EXACT, place)
        for name in progress(list(FORMS), "packed"):
            found = scores(run, FORMS[name], place)
            record = json.loads((place / "packed" / "packed.json").read_text())
            key = name.replace(" ", "_").replace(":", "_")
            measured.append((f"bits_{key}", record["bits"], "bits per weight and task"))
            measured.append((f"error_{key}", mean(record["errors"].values()), "relative error"))
            kept = mean(found[task] / experts[task] for task in experts)
            measured.append((f"recovered_{key}", kept, "of the experts' accuracy"))
    figure("experts_accuracy", mean(experts.values()), "accuracy", "")
    for name, value, unit in measured:
        figure(name, value, unit, ">= 0.99" if name == "recovered_lowrank_8" else "")


if __name__ == "__main__":
    main()
