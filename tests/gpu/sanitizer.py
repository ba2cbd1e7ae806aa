"""Wrong addresses and races in the kernels and between streams, by NVIDIA's compute-sanitizer if installed.

The second run of the streams allocates from CUDA's own pool, so that the tool sees which stream uses memory
before another one has made it, or after it was freed.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

from tests.gpu.setting import Row, Setting, row

RACES = ("--track-stream-ordered-races", "all")
POOL = {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}
RUNS: dict[str, tuple[str, tuple[str, ...], dict[str, str]]] = {  # part, the tool's arguments, environment
    "memcheck": ("contract", ("--tool", "memcheck"), {}),
    "racecheck": ("contract", ("--tool", "racecheck"), {}),
    "memcheck_streams": ("streams", ("--tool", "memcheck"), {}),
    "races_of_streams": ("streams", ("--tool", "memcheck", *RACES), POOL),
}
LIMIT = 1800  # seconds: a checked kernel runs a hundred times slower


def run(setting: Setting) -> Iterator[Row]:
    """Tiny parts under each tool. Raises AssertionError with what it printed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or not setting.cuda:
        yield row("sanitizer", None, "no compute-sanitizer" if setting.cuda else "needs a GPU")
        return
    for name, (part, arguments, environment) in RUNS.items():
        inner = [sys.executable, "-m", "tests.gpu", "--tiny", "--part", part]
        command = [tool, *arguments, "--error-exitcode", "9", *inner]
        own = {**os.environ, **environment}
        done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=LIMIT, check=False)
        assert done.returncode == 0, f"{name}:\n{done.stdout[-3000:]}{done.stderr[-1000:]}"
        yield row(f"sanitizer_{name}", 0, "errors")
