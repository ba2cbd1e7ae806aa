"""`make bench`: one JSON line a figure, {"name", "value", "unit", "bar"}."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.results import FOLDER
from trainmerge.run.manifest import versions
from trainmerge.system.atomic import write_whole

GROUPS = (
    "exactness",
    "kernels",
    "fit_memory",
    "fit_step",
    "guard",
    "auto",
    "forecast",
    "time_to_quality",
    "beyond",
    "written_texts",
    "fit_lm",
    "closed_memory",
    "closed_cost",
    "closed_demo",
    "tradeoffs",
    "niches",
    "scale",
    "export",
    "mergekit",
    "large_fit",
    "plan_memory",
    "peer_fit",
    "quantised",
    "neighbour",
    "moe",
    "packed",
    "packed_suite",
    "residency",
)


def main() -> None:
    """Run each chosen group in a process of its own, so that none inherits another's memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="all", choices=["all", *GROUPS])
    parser.add_argument("--keep", metavar="MACHINE", help="write the figures into tests/results/bench too")
    chosen = parser.parse_args()
    for group in GROUPS if chosen.only == "all" else [chosen.only]:
        command = [sys.executable, "-m", f"tests.bench.{group}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines = [line for line in process.stdout if print(line, end="", flush=True) is None]
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        if chosen.keep:
            keep(FOLDER / "bench" / f"{group}.json", [json.loads(line) for line in lines], chosen.keep)


def keep(file: Path, measured: list[dict[str, Any]], machine: str) -> None:
    """Write the values into the group's file of results; texts and figures not measured stay."""
    content = json.loads(file.read_text())
    values = {row["name"]: row for row in measured}
    if unknown := values.keys() - {row["name"] for row in content["figures"]}:
        raise ValueError(
            f"{file} has no figure {', '.join(sorted(unknown))}: add it, with a `what` for the page"
        )
    for row in content["figures"]:
        if row["name"] in values:
            row["value"] = float(f"{values[row['name']]['value']:.4g}")
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    write_whole(file, json.dumps({**content, "machine": machine, "versions": packages}, indent=1) + "\n")


def figure(name: str, value: float, unit: str, bar: str) -> None:
    """Print one measured figure."""
    print(json.dumps({"name": name, "value": float(f"{value:.6g}"), "unit": unit, "bar": bar}), flush=True)


if __name__ == "__main__":
    main()
