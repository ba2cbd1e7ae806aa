"""Packed experts of the text suite, eight full ones: bits per weight and task against the kept share."""

import contextlib
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import trainmerge as tm
from tests.bench.guard import trainmerge
from tests.bench.packed import TEXTS, measure, report
from trainmerge.run.folder import RunFolder
from trainmerge.run.open_run import read_run
from trainmerge.system.console import progress

CONFIG = "configs/expert-merging-text.yaml"
EXPERTS = "experts"
CODECS = ("mask", "emr", "ternary", "ternary:0.05", "pca:1", "lowrank:8", "lowrank:16", "lowrank:32")
FORMS = {**{codec: tm.PackedForm(codec) for codec in CODECS}, "budget 1.5": tm.PackedForm(budget="1.5")}


def score_experts(run: Path) -> dict[str, float]:
    """Every expert's accuracy on test texts of its own task, from its own files."""
    recipe, found = read_run(RunFolder(run))[0], {}
    for task, expert in recipe.experts.items():
        alone = replace(recipe, experts={task: expert})
        (found[task],) = tm.evaluate_checkpoint(expert.path, alone, TEXTS, max_length=64).means().values()
    return {"bits": 32.0, "error": 0.0, **found}


def main() -> None:
    """Pack the experts in every way, and score them; nothing is learned."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        run = Path(folder) / "suite"
        steps = ("--trainer.max_steps=0", "--report=false", "--model.objective=trainmerge.Entropy")
        trainmerge("fit", "--config", CONFIG, "--run", str(run), *steps)
        found = {EXPERTS: score_experts(run)}
        found |= {name: measure(run, FORMS[name]) for name in progress(list(FORMS), "packed")}
    report(found, EXPERTS, "suite_")


if __name__ == "__main__":
    main()
