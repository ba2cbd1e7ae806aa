"""`make bench`: one JSON line a figure, {"name", "value", "unit", "bar"}."""

import argparse
import json
import subprocess
import sys

GROUPS = (
    "exactness",
    "kernels",
    "fit_memory",
    "fit_step",
    "guard",
    "fit_lm",
    "closed_memory",
    "closed_cost",
    "tradeoffs",
    "scale",
    "export",
    "large_fit",
    "plan_memory",
    "peer_fit",
    "quantised",
)


def main() -> None:
    """Run each chosen group in a process of its own, so that none inherits another's memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="all", choices=["all", *GROUPS])
    only = parser.parse_args().only
    for group in GROUPS if only == "all" else [only]:
        subprocess.run([sys.executable, "-m", f"tests.bench.{group}"], check=True)


def figure(name: str, value: float, unit: str, bar: str) -> None:
    """Print one measured figure."""
    print(json.dumps({"name": name, "value": round(value, 12), "unit": unit, "bar": bar}), flush=True)


if __name__ == "__main__":
    main()
