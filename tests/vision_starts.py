"""The rows of `make suite-vision` that are searched on held-out pictures, without labels.

A closed form gets the scale of its coefficients that recovers most of the experts' outputs; `auto` is the
command itself, whose trials are in the same folder. Both hold out a fifth of each task's 128 pictures.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from tests import results
from trainmerge.auto import auto_config
from trainmerge.auto.judging import Judged
from trainmerge.auto.scales import common_scale
from trainmerge.auto.search import AutoSearch
from trainmerge.auto.starts import Start
from trainmerge.auto.trials import TrialLog
from trainmerge.coefficients.layer_least_squares import LayerLeastSquares
from trainmerge.preprocess import Iso
from trainmerge.run.config import read_settings

HELD_OUT = 0.2
STARTS = {  # those that `auto` tries itself by their names there
    "ties": "TIES",
    "tsv-m": "TSV-M",
    "optmerge": "OptMerge",
    "aswudi": "ASWUDI",
    "least-squares": "layer least squares",
    "least-squares-sequence": Start("in sequence", initial=LayerLeastSquares(sequential=True)),
    "iso-c": Start("Iso-C", (Iso(common=1.0),)),
}
AUTO = "auto"
HELD_OUT_ROWS = "vision-auto/held-out"


def table() -> str:
    """Markdown: what `auto` recovered of the experts on held-out pictures, a row per start."""
    rows: dict[str, Any] = results.measured(HELD_OUT_ROWS) or {}
    if not rows:
        return "**Not measured yet.**"
    lines = ["| start | scale | mean | worst expert |", "|---|---|---|---|"]
    for name in sorted(rows, key=lambda name: -rows[name]["mean"]):
        row = rows[name]
        scales = ", ".join(f"{scale:.2f}" for scale in sorted({*row["scales"]}))
        lines.append(f"| {name} | {scales} | {row['mean']:.3f} | {row['worst']:.3f} |")
    return "\n".join(lines)


def settings(config: Path) -> dict[str, Any]:
    """The suite's configuration with more pictures, a smaller start and smaller steps."""
    content = read_settings(config)
    content["model"] |= {"initial": 0.1}
    content["model"]["optimizer"]["init_args"]["lr"] = 0.02
    content["data"] |= {"batch_size": 8, "max_examples": 192}
    return content


def settled(name: str, config: Path, runs: Path, seed: int) -> Path:
    """The run folder of a searched row; goes on where it stopped. The seed draws the held-out pictures."""
    ending = f"-{seed}" if seed else ""
    file, place = runs / f"auto{ending}.yaml", runs / f"auto-merged{ending}-auto"
    file.parent.mkdir(parents=True, exist_ok=True)
    content = settings(config) | ({"seed_everything": seed} if seed else {})
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    if name == AUTO:
        if not (done := place / "auto.json").exists():
            auto_config(file, runs / f"auto-merged{ending}", overwrite=True)
        found = json.loads(done.read_text())
        results.keep(HELD_OUT_ROWS, results.fingerprint(content), found["rows"])
        return place / str(found["run"])
    search = AutoSearch(file, place, HELD_OUT, None, None)
    start = STARTS[name]
    if isinstance(start, Start):
        module = search.settings.module
        log = TrialLog(search.place / "trials.jsonl")
        judged = Judged(start, module.inputs(search.settings.data), module.objective, log, {})
        search.judged[start.name] = judged
    else:
        judged = search.judged[start]
    trial = common_scale(judged, search.K, judged.start.scales)
    print(f"{name}: recovers {trial.mean:.3f} at scale {trial.scales[0]:.2f}", flush=True)
    judged.release()
    return search.settle(trial)
