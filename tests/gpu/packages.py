"""The packages that a GPU machine without a network lacks: carried there as wheels.

`python -m tests.gpu.packages FOLDER`, where there is a network, fetches the wheels of requirements.lock
without torch. `make gpu WHEELS=FOLDER` then unpacks those that the machine lacks into build/gpu-packages,
beside its own torch and triton; nothing that the machine has is changed.
"""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
UNPACKED = ROOT / "build" / "gpu-packages"
STAYS = ("torch", "triton")  # the machine's own, made for its driver


def fetch(folder: Path) -> None:
    """Download the wheels for this Python and platform."""
    pins = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line]
    wanted = [pin for pin in pins if pin.partition("==")[0] not in STAYS]
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    pip("download", *options, *wanted)


def pip(*arguments: str) -> str:
    """What pip prints. Raises CalledProcessError; its errors go to this process's."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def missing(wheels: str) -> list[str]:
    """name==version of what pip would install from the wheels for trainmerge, beside what is here."""
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found = pip(
        "install", "--quiet", "--dry-run", "--report", "-", "--no-index", "--find-links", wheels, *needs
    )
    chosen = [one["metadata"] for one in json.loads(found)["install"]]
    return [f"{one['name']}=={one['version']}" for one in chosen]


def unpack(wheels: str) -> Path:
    """Unpack what is missing; -> the folder, for PYTHONPATH.

    Raises:
        SystemExit: torch itself would have to come from the wheels.
    """
    wanted = missing(wheels)
    if own := [name for name in wanted if name.partition("==")[0] in STAYS]:
        raise SystemExit(f"make gpu: this machine's Python needs {', '.join(own)} or later: install it first")
    if wanted:
        options = ["--quiet", "--no-index", "--no-deps", "--upgrade", "--target", str(UNPACKED)]
        pip("install", *options, "--find-links", wheels, *wanted)
    return UNPACKED


def begin_again(folder: Path) -> None:
    """Run this command once more, with the unpacked packages first."""
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONPATH": path})


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
