"""`make gpu`: everything that needs a GPU, in one command; the answer is one file of JSON.

    python -m tests.gpu --wheels FOLDER           # on a machine with CUDA, torch and triton, and no network
    python -m tests.gpu --device cpu --tiny       # the same code in seconds, on any machine

Each part runs in a process of its own on a GPU, since an illegal address ends a process's use of it. The exit
code is 1 if a part failed; the other parts run nevertheless.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.gpu import packages

PARTS = ("contract", "streams", "gradients", "fits", "ranks", "sanitizer", "bandwidth", "steps", "memory")
BEGUN = "TRAINMERGE_GPU_PACKAGES"  # set once the missing packages are in the path


def main() -> None:
    """Run the chosen parts and write the file."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="sizes that take seconds on a CPU")
    parser.add_argument("--part", choices=PARTS, help="this part only, its rows to the screen")
    parser.add_argument("--wheels", default="", help="folder of wheels for what this Python lacks")
    parser.add_argument("--out", type=Path, default=Path("build/gpu.json"), help="where the answer goes")
    chosen = parser.parse_args()
    if chosen.wheels and BEGUN not in os.environ:
        os.environ[BEGUN] = "1"
        packages.begin_again(packages.unpack(chosen.wheels))
    if chosen.part:
        for row in rows_of(chosen.part, chosen.device, chosen.tiny):
            print(json.dumps(row), flush=True)
        return
    answer = {**machine(chosen.device), "tiny": chosen.tiny, "parts": run(chosen.device, chosen.tiny)}
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(answer, indent=1) + "\n")
    failed = [name for name, part in answer["parts"].items() if part["error"]]
    print(f"{chosen.out}: {f'failed: {chr(44).join(failed)}' if failed else 'all parts passed'}")
    sys.exit(1 if failed else 0)


def machine(device: str) -> dict[str, Any]:
    """The card, its driver and the versions."""
    import torch

    from trainmerge.run.manifest import versions

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("make gpu: torch sees no GPU here (--device cpu --tiny runs the same code anywhere)")
    card = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    return {"device": card, "cuda": torch.version.cuda, "versions": versions()}


def run(device: str, tiny: bool) -> dict[str, Any]:
    """Every part's rows, seconds and error."""
    answer = {}
    for part in PARTS:
        began, rows, error = time.perf_counter(), [], ""
        try:
            for row in in_process(part, tiny) if device == "cuda" else rows_of(part, device, tiny):
                rows.append(row)
                print(json.dumps(row), flush=True)
        except Exception as failed:  # the other parts still run
            error = f"{type(failed).__name__}: {failed}"
            print(f"{part} failed: {error}", file=sys.stderr, flush=True)
        answer[part] = {"rows": rows, "error": error, "seconds": round(time.perf_counter() - began, 1)}
    return answer


def rows_of(part: str, device: str, tiny: bool) -> Any:
    """A part's rows, in this process."""
    import torch

    from tests.gpu.setting import Setting

    return importlib.import_module(f"tests.gpu.{part}").run(Setting(torch.device(device), tiny))


def in_process(part: str, tiny: bool) -> Any:
    """A part's rows, from a process of its own. Raises RuntimeError with the end of what it printed."""
    command = [sys.executable, "-m", "tests.gpu", "--part", part, *["--tiny"] * tiny]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
            else:
                print(line, end="", file=sys.stderr)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}; its errors are above")


if __name__ == "__main__":
    main()
