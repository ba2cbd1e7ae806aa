"""A fit beside one busy process: its wall time over that of the same fit alone.

On two cores a fair share is one and a half of them, so that a fit with two threads takes a third longer at
least; OpenMP threads that spin at barriers have taken ten times as long. The neighbour is there before the
fit, or comes when it has begun to learn. The demo's fit as the command line runs it, which chooses its
threads itself; medians of `REPEATS` (3) rounds of all three, on an otherwise quiet machine.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.bench.__main__ import figure

REPEATS, STEPS = int(os.environ.get("REPEATS", "3")), int(os.environ.get("STEPS", "40"))
BAR = "2.2"
OWN = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS")  # the command chooses


def busy() -> subprocess.Popen[bytes]:
    """A process that never waits, until this one ends."""
    program = "import os; own = os.getppid()\nwhile os.getppid() == own: pass"
    return subprocess.Popen([sys.executable, "-c", program])


def fit(place: Path, neighbour: Callable[[Path], bool]) -> float:
    """Seconds of one fit; `neighbour(run)` says when the busy process begins."""
    environment = {name: value for name, value in os.environ.items() if name not in OWN}
    run = place / "run"
    command = [sys.executable, "-m", "trainmerge.cli", "fit", "configs/demo.yaml", str(run), "--no-report"]
    command += ["--trainer.max-steps", str(STEPS)]
    other: subprocess.Popen[bytes] | None = None
    if neighbour(run):
        other = busy()
        time.sleep(1)  # the command looks at what others do
    try:
        began = time.perf_counter()
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                if other is None and neighbour(run):
                    other = busy()
                time.sleep(0.05)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        return time.perf_counter() - began
    finally:
        if other is not None:
            other.kill()
            other.wait()


def main() -> None:
    """Alone, beside a neighbour, and with one that comes later, in turn."""
    kinds: dict[str, Callable[[Path], bool]] = {
        "alone": lambda _: False,
        "beside": lambda _: True,
        "later": lambda run: (run / "metrics.jsonl").exists(),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(REPEATS):
        for kind, neighbour in kinds.items():
            with tempfile.TemporaryDirectory() as name:
                seconds[kind].append(fit(Path(name), neighbour))
    alone = statistics.median(seconds.pop("alone"))
    for kind, own in seconds.items():
        figure(f"fit_{kind}_a_busy_process_over_alone", statistics.median(own) / alone, "ratio", BAR)


if __name__ == "__main__":
    main()
