"""CPU time and memory of an export of three experts of 498 M bfloat16 parameters, over the bare minimum's.

The minimum is `minimum_merge`: read, one pass, write the same files. Each run is a process of its own, timed
from its start to its end, import of torch included, one thread; all are run in turn, `REPEATS` (3) times, the
files in the page cache, and the median counts. With `MK=VENV/bin`, an environment with mergekit==0.1.5, that
is run between them too.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.bench.__main__ import figure
from tests.bench.llama500 import FOLDER, experts
from trainmerge.system.memory import anonymous

REPEATS = int(os.environ.get("REPEATS", "3"))
DENSITY = 0.5  # of TIES on both sides
OURS = ("linear", "task_arithmetic", "learned", "ties", "ties_parameter")
BARS = {"linear": "2", "task_arithmetic": "2", "learned": "2", "ties": "6", "ties_parameter": ""}
MERGEKIT = {"linear": "2.5", "task_arithmetic": "2.5", "ties": "10"}


class Run(NamedTuple):
    """What one process took."""

    cpu: float  # seconds, user and system
    wall: float
    memory: int  # bytes, the highest anonymous memory seen


def timed(command: Sequence[str]) -> Run:
    """Run a command to its end. Raises CalledProcessError if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    start, memory = time.perf_counter(), 0
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        while True:
            memory = max(memory, anonymous(process.pid))
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            time.sleep(0.01)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Run(usage.ru_utime + usage.ru_stime, time.perf_counter() - start, memory)


def prepare(place: Path) -> None:
    """A run folder of each kind, by a fit of no steps."""
    import torch

    import trainmerge as tm
    from trainmerge.coefficients.coefficients import save_coefficients

    for kind in OURS:
        steps = {"ties": [tm.Ties(DENSITY)], "ties_parameter": [tm.Ties(DENSITY, "parameter")]}.get(kind, [])
        recipe = tm.Recipe(
            str(FOLDER / "base"), {n: tm.Expert(str(path)) for n, path in experts().items()}, preprocess=steps
        )
        initial = 1 / 3 if kind == "linear" else 0.3
        module = tm.MergeModule(recipe, initial=initial, workspace=str(place / kind / "workspace"))
        if kind == "learned":  # as a fit leaves them: each parameter's own
            generator = torch.Generator().manual_seed(0)
            module.coefficients.reset_(torch.rand(module.coefficients.raw.shape, generator=generator))
        trainer = tm.make_trainer(place / kind, max_steps=0, accelerator="cpu", enable_progress_bar=False)
        tm.fit(module, tm.Calibration({}, recipe.base), trainer, place / kind)
        save_coefficients(module.coefficients, place / kind / "coefficients.safetensors")


def mergekit(kind: str, place: Path) -> list[str]:
    """mergekit's command for a kind of merge, its configuration written."""
    base = "" if kind == "linear" else f"base_model: {FOLDER / 'base'}\n"
    values = {"linear": "{weight: 0.33}", "ties": f"{{weight: 0.3, density: {DENSITY}}}"}
    weights = values.get(kind, "{weight: 0.3}")
    models = "".join(f"  - model: {path}\n    parameters: {weights}\n" for path in experts().values())
    file = place / f"{kind}.yml"
    file.write_text(f"merge_method: {kind}\n{base}models:\n{models}dtype: bfloat16\n")
    return [f"{os.environ['MK']}/mergekit-yaml", str(file), str(place / "out"), "-j", "1"]


def commands(place: Path) -> dict[str, list[str]]:
    """All that is run, by name."""
    out = str(place / "out")
    folders = [str(FOLDER / "base"), *map(str, experts().values())]
    script = str(Path(__file__).with_name("minimum_merge.py"))
    made = {"minimum": [sys.executable, script, out, "0.3", *folders]}
    for kind in OURS:
        made[kind] = [sys.executable, "-m", "trainmerge.cli", "export", str(place / kind), out]
    if "MK" in os.environ:
        made |= {f"mergekit_{kind}": mergekit(kind, place) for kind in MERGEKIT}
    return made


def report(runs: Mapping[str, Sequence[Run]]) -> None:
    """Print the figures."""
    cpu = {name: statistics.median(run.cpu for run in own) for name, own in runs.items()}
    wall = {name: statistics.median(run.wall for run in own) for name, own in runs.items()}
    memory = {name: max(run.memory for run in own) for name, own in runs.items()}
    figure("minimum_cpu_seconds", cpu["minimum"], "s", "")
    for kind in OURS:
        figure(f"{kind}_cpu_over_minimum", cpu[kind] / cpu["minimum"], "ratio", BARS[kind])
        figure(f"{kind}_wall_over_minimum", wall[kind] / wall["minimum"], "ratio", "")
        figure(f"{kind}_anonymous_peak", memory[kind] / 2**20, "MiB", "")
    for kind, bar in MERGEKIT.items() if "mergekit_ties" in runs else ():
        theirs = f"mergekit_{kind}"
        figure(f"mergekit_over_ours_{kind}", cpu[theirs] / cpu[kind], "ratio", bar)
        figure(f"ours_over_mergekit_memory_{kind}", memory[kind] / memory[theirs], "ratio", "0.5")
        figure(f"{theirs}_cpu_seconds", cpu[theirs], "s", "")


def main() -> None:
    """Make the models and runs, then time every command in turn."""
    experts()
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as name:
        place = Path(name)
        subprocess.run([sys.executable, "-m", "tests.bench.export", name], check=True)
        for file in FOLDER.rglob("*.safetensors"):
            file.read_bytes()  # into the page cache
        runs: dict[str, list[Run]] = {}
        for _ in range(REPEATS):
            for kind, command in commands(place).items():
                runs.setdefault(kind, []).append(timed(command))
                shutil.rmtree(place / "out")
        report(runs)


if __name__ == "__main__":
    match sys.argv[1:]:
        case [place]:
            prepare(Path(place))
        case _:
            main()
