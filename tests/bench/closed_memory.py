"""Peak memory of merging three experts of 498 M bfloat16 parameters without learning, tensor by tensor.

Task arithmetic, TIES, DARE and TSV-M (`METHODS` names some), each by a fit of no steps and its export, in
a process of its own. The checkpoints are those of `export`; memory is counted as in `fit_memory`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.__main__ import figure
from tests.bench.llama500 import FOLDER, experts
from trainmerge.system.memory import Peak

METHODS = os.environ.get("METHODS", "linear ties dare tsv").split()


def merge(method: str, folder: Path) -> dict[str, float]:
    """A fit of no steps and its export."""
    import trainmerge as tm

    steps = {"linear": [], "ties": [tm.Ties()], "dare": [tm.Dare()], "tsv": [tm.Tsv()]}[method]
    merged = {name: tm.Expert(str(path)) for name, path in experts().items()}
    recipe = tm.Recipe(str(FOLDER / "base"), merged, preprocess=steps)
    run = folder / f"run-{method}"
    with Peak() as peak:
        start = time.process_time()
        module = tm.MergeModule(recipe, initial=0.3, workspace=str(run / "workspace"))
        trainer = tm.make_trainer(run, max_steps=0, accelerator="cpu", enable_progress_bar=False)
        tm.fit(module, tm.Calibration({}, recipe.base), trainer, run)
        tm.export_run(run, folder / f"merged-{method}")
        seconds = time.process_time() - start
    return {"bytes": peak.grown, "seconds": seconds}


def main() -> None:
    """One process a method."""
    experts()
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
    for method in METHODS:
        with tempfile.TemporaryDirectory(dir=FOLDER.parent) as place:  # TSV-M keeps 6 GB there
            command = [sys.executable, "-m", "tests.bench.closed_memory", method, place]
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        got = json.loads(done.stdout.splitlines()[-1])
        figure(f"closed_peak_{method}", got["bytes"] / 1e9, "GB", "1.5")
        figure(f"closed_cpu_seconds_{method}", got["seconds"], "s", "")


if __name__ == "__main__":
    match sys.argv[1:]:
        case [method, place]:
            print(json.dumps(merge(method, Path(place))))
        case _:
            main()
