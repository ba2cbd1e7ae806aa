"""Packed experts of the text suite, eight full ones: bits per weight and task against the kept share."""

import contextlib
import sys
import tempfile
from pathlib import Path

import trainmerge as tm
from tests.bench.guard import trainmerge
from tests.bench.packed import measure, report
from trainmerge.system.console import progress

CONFIG = "configs/expert-merging-text.yaml"
EXACT = "budget 9"  # room for nine models
CODECS = ("mask", "emr", "ternary", "ternary:0.05", "pca:1", "lowrank:8", "lowrank:16", "lowrank:32")
FORMS = {
    EXACT: tm.PackedForm(budget="9", dtype="float32"),
    **{codec: tm.PackedForm(codec) for codec in CODECS},
    "budget 1.5": tm.PackedForm(budget="1.5"),
}


def main() -> None:
    """Pack the experts in every way, and score them; nothing is learned."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        run = Path(folder) / "suite"
        steps = ("--trainer.max_steps=0", "--report=false", "--model.objective=trainmerge.Entropy")
        trainmerge("fit", "--config", CONFIG, "--run", str(run), *steps)
        found = {name: measure(run, FORMS[name]) for name in progress(list(FORMS), "packed")}
    report(found, EXACT, "suite_")


if __name__ == "__main__":
    main()
