"""What unlabeled examples say of every row of `make suite-closed`, and what labels say.

    .venv/bin/python -m tests.held_out_rows SUITE [--methods ...]

Every row's merge is judged on the same 24 examples of each expert, from which no row learned. One that was
learned is fitted again where its run folder is gone. Resumable: shares are kept in `tests/results/shares`.

Legend: `K` experts.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml

from tests import results
from tests.closed_methods import METHODS, Method
from tests.closed_suite import SUITES, measured, options_of
from trainmerge.coefficients.initial import read_initial
from trainmerge.data.calibration import Calibration
from trainmerge.fitting.calibration_loss import batches
from trainmerge.fitting.fit import fit
from trainmerge.fitting.from_config import from_config
from trainmerge.fitting.prepare import prepare, record_experts
from trainmerge.model.resident import Resident
from trainmerge.model.teachers import Record
from trainmerge.objectives import Alignment, JensenShannon, Objective
from trainmerge.system.atomic import write_whole

RUNS = Path("runs/held-out-rows")
AFTER = {"text": 256, "lm": 64}  # examples per expert that some row learned from
EXAMPLES = 24
LOSSES: dict[str, Objective] = {
    "forward KL": Alignment(),
    "reverse KL": JensenShannon(1.0),
    "Jensen-Shannon": JensenShannon(0.5),
}


def changes_of(method: Method) -> dict[str, Any]:
    """What a row changes of the suite's configuration, by key."""
    pairs = (option.removeprefix("--").partition("=") for option in options_of(method))
    return {key: yaml.safe_load(value) for key, _, value in pairs}


def learned(suite: str, name: str) -> Path:
    """The coefficients that a row learned; fitted again if no run folder has them."""
    for run in (Path(f"runs/closed-suite/{suite}/{name}-0"), RUNS / suite / name):
        if (file := run / "coefficients.safetensors").exists():
            return file
    made = from_config(f"configs/{SUITES[suite].config}", run, changes_of(METHODS[name]))
    fit(made.module, made.data, made.trainer, made.run, made.resume, config=made.text)
    return file


def judged(suite: str, name: str) -> dict[str, list[float]]:
    """What a row recovers of each expert, [K], by loss."""
    config, changes = f"configs/{SUITES[suite].config}", changes_of(METHODS[name])
    fits = changes.get("trainer.max_steps") != 0
    file = learned(suite, name) if fits else None
    made = from_config(config, RUNS / suite / "judging", {**changes, "trainer.max_steps": 0})
    inputs = made.module.inputs(made.data).without_records()
    resident = prepare(inputs, "cpu", nullcontext).resident
    if file is not None:
        own = inputs.coefficients
        own.reset_(read_initial(str(file), own.experts, inputs.opened.layout))
    data = unseen(suite, config)
    records = record_experts(replace(inputs, asks=Alignment().asks, data=data), resident)
    base = RUNS / suite / "base.json"
    if not base.exists():
        with resident.merged.uniform(torch.zeros(len(data.examples)), everywhere=True):
            write_whole(base, json.dumps(losses(resident, data, records)))
    before = json.loads(base.read_text())
    resident.merged.materialise()
    after = losses(resident, data, records)
    return {loss: [1 - a / b for a, b in zip(after[loss], before[loss], strict=True)] for loss in after}


def unseen(suite: str, config: str) -> Calibration:
    """The examples that judge: none that a row learned from."""
    after = AFTER[suite]
    data = from_config(config, RUNS / suite / "examples", {"data.max_examples": after + EXAMPLES}).data
    return data.with_examples([own[after:] for own in data.examples])


@torch.no_grad()
def losses(resident: Resident, data: Calibration, records: Sequence[Record]) -> dict[str, list[float]]:
    """The mean of every loss over each expert's examples, [K], at the model's weights."""
    total = {loss: torch.zeros(len(records), dtype=torch.float64) for loss in LOSSES}
    for batch in batches(resident, data):
        batch = batch._replace(teacher=records[batch.expert].of(batch.ids, resident.device))
        outputs = resident(batch, ())
        for loss, objective in LOSSES.items():
            total[loss][batch.expert] += objective(outputs, batch).double().sum()
    counts = torch.tensor([len(own) for own in data.examples])
    return {loss: (found / counts).tolist() for loss, found in total.items()}


def main() -> None:
    """Judge the rows that have a score and no shares yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    given = parser.parse_args()
    for name in given.methods:
        kept, made_by = f"shares/{given.suite}-{name}", results.fingerprint(SUITES[given.suite].config)
        if measured(given.suite, name) and results.recall(kept, made_by) is None:
            found = judged(given.suite, name)
            results.keep(kept, made_by, found)
            print(
                name, {loss: round(mean(own), 4) for loss, own in found.items()}, file=sys.stderr, flush=True
            )


if __name__ == "__main__":
    main()
