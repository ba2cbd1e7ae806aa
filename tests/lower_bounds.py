"""`make lower-bounds`: install the oldest versions that pyproject.toml promises, and run the quick tests.

torch keeps the version of constraints.txt: older ones for Linux are built for CUDA there, gigabytes.
"""

import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACE = ROOT / ".venv-lower"
KEPT = {"torch"}
TOOLS = ["pytest>=8.4", "accelerate", "setuptools>=77"]
EXTRAS = ("search",)
QUICK = ["cli", "checkpoints", "coefficients", "evaluate", "export", "fitting/test_fit.py",
         "model/test_merged_model.py", "test_layers.py", "test_packaging.py", "tradeoffs"]  # fmt: skip


def oldest() -> list[str]:
    """The package's requirements and some extras', each at the version that it says at least."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + [need for extra in EXTRAS for need in extras[extra]]
    return [re.sub(r"\s*>=\s*", "==", need) for need in wanted if re.split(r"[\[>=]", need)[0] not in KEPT]


def main() -> None:
    """Make the environment, say what is in it, and test."""
    python = PLACE / "bin" / "python"
    if not python.exists():
        venv.create(PLACE, with_pip=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*install, "-c", ROOT / "constraints.txt", *oldest(), *sorted(KEPT), *TOOLS)
    run(*install, "--no-deps", "--no-build-isolation", "-e", ROOT)
    run(python, "-m", "pip", "freeze", "--all")
    # Old releases call what the newest of their own dependencies deprecate: pyparsing under matplotlib, say.
    old = ["-W", "ignore::DeprecationWarning"]
    run(
        python,
        "-m",
        "pytest",
        "-m",
        "not real",
        *old,
        *(ROOT / "tests" / name for name in QUICK),
    )


def run(*command: object) -> None:
    """Run, and end with its exit code if it fails."""
    done = subprocess.run([str(part) for part in command], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
