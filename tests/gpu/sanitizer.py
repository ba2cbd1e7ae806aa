"""Wrong addresses and races in the kernels, by NVIDIA's compute-sanitizer where it is installed."""

import shutil
import subprocess
import sys
from collections.abc import Iterator

from tests.gpu.setting import Row, Setting, row

TOOLS = ("memcheck", "racecheck")
LIMIT = 1800  # seconds: a checked kernel runs a hundred times slower


def run(setting: Setting) -> Iterator[Row]:
    """The tiny contract under each tool. Raises AssertionError with what it printed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or not setting.cuda:
        yield row("sanitizer", None, "no compute-sanitizer" if setting.cuda else "needs a GPU")
        return
    inner = [sys.executable, "-m", "tests.gpu", "--tiny", "--part", "contract"]
    for name in TOOLS:
        command = [tool, "--tool", name, "--error-exitcode", "9", *inner]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
        assert done.returncode == 0, f"{name}:\n{done.stdout[-3000:]}{done.stderr[-1000:]}"
        yield row(f"sanitizer_{name}", 0, "errors")
