"""`make test-processors`: the tests as other processors, with other threads, and on a busy machine.

One line per setting: its name, minutes, pytest's closing line; below it, the tests that failed. Whole outputs
are in build/processors. Tests marked `real` are left out: `make test` runs them on this processor.

    python -m tests.processors                            everything
    python -m tests.processors --only avx2 tests/kernels  settings by a part of their name; pytest's arguments
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[1]
OUTPUTS = ROOT / "build" / "processors"
BUSY = 8  # processes that compute as long as the tests run
WORKERS = "4"  # processes that share the tests beside those
ENDLESS = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"  # however the parent ends


class Setting(NamedTuple):
    """What a run of the tests is to believe of its machine."""

    capability: str  # ATEN_CPU_CAPABILITY
    threads: int
    busy: int = 0

    @property
    def name(self) -> str:
        """As in avx2-2-threads-8-busy."""
        return f"{self.capability}-{self.threads}-threads" + (f"-{self.busy}-busy" if self.busy else "")


def settings() -> list[Setting]:
    """Every instruction set that this processor can run as, with one thread and two; its own while busy."""
    own = torch.backends.cpu.get_cpu_capability().lower()
    capabilities = dict.fromkeys(["default", *(["avx2"] if own == "avx512" else []), own])
    idle = [Setting(capability, threads) for capability in capabilities for threads in (1, 2)]
    return [*idle, Setting(own, 1, BUSY), Setting(own, 2, BUSY)]


@contextmanager
def load(count: int) -> Iterator[None]:
    """That many busy processes."""
    busy = [subprocess.Popen([sys.executable, "-c", ENDLESS]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def run(setting: Setting, arguments: list[str]) -> bool:
    """Run the tests in this setting and print how they ended; whether all is well."""
    environment = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": setting.capability,
        "OMP_NUM_THREADS": str(setting.threads),  # of processes that tests start
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads take the processor from those they await
        "TRAINMERGE_TEST_THREADS": str(setting.threads),
    }
    workers = ["-n", WORKERS if setting.busy else "auto", "--maxprocesses", "8"]
    files = ["--dist", "loadfile", "--no-loadscope-reorder"]  # those with long tests come first
    command = [
        sys.executable,
        "-m",
        "pytest",
        *workers,
        *files,
        "-m",
        "not real",
        "-rfE",
        "--show-capture=no",
    ]
    file, began = OUTPUTS / f"{setting.name}.txt", time.monotonic()
    with load(setting.busy), file.open("w") as output:
        done = subprocess.run(
            [*command, *arguments], cwd=ROOT, env=environment, stdout=output, stderr=output, check=False
        )
    lines = file.read_text().splitlines() or ["no output"]
    print(f"{setting.name:26} {(time.monotonic() - began) / 60:5.1f} min  {lines[-1]}", flush=True)
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            print(f"    {line}", flush=True)
    return done.returncode == 0


def main() -> int:
    """Run the settings; 1 if the tests fail in one."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.processors", description="Run the tests per setting."
    )
    parser.add_argument("--only", default="", help="a setting, or all whose name contains this")
    chosen, arguments = parser.parse_known_args()
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    wanted = [setting for setting in settings() if setting.name == chosen.only]
    wanted = wanted or [setting for setting in settings() if chosen.only in setting.name]
    if not wanted:
        parser.error(f"--only must be a part of one of {', '.join(setting.name for setting in settings())}")
    red = [setting.name for setting in wanted if not run(setting, arguments)]
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
