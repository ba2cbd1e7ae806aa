"""What unlabeled examples say of every row of `make suite-closed`, and what labels say.

    .venv/bin/python -m tests.held_out_rows SUITE [--methods ...]

Each row's merge is judged by several losses on the same 24 examples of each expert, from which none learned.
One that was learned is fitted again where its run folder is gone. Resumable: `tests/results/shares`.

Legend: `K` experts.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
import yaml

from tests import results
from tests.closed_methods import METHODS
from tests.closed_suite import RUNS as CLOSED
from tests.closed_suite import SUITES, file_of, options_of
from tests.held_out_scores import TITLES
from trainmerge.coefficients.initial import read_initial
from trainmerge.data.calibration import Calibration
from trainmerge.fitting.calibration_loss import batches
from trainmerge.fitting.fit import fit
from trainmerge.fitting.from_config import from_config
from trainmerge.fitting.prepare import prepare, record_experts
from trainmerge.model.resident import Resident
from trainmerge.model.teachers import Record
from trainmerge.objectives import Alignment, JensenShannon, Objective, TotalVariation
from trainmerge.system.atomic import write_whole
from trainmerge.system.correlation import rank_correlation

RUNS = Path("runs/held-out-rows")
AFTER = {"text": 256, "lm": 64}  # examples per expert that some row learned from
EXAMPLES = 24
LOSSES: dict[str, Objective] = {
    "forward KL": Alignment(),
    "reverse KL": JensenShannon(1.0),
    "Jensen-Shannon": JensenShannon(0.5),
    "total variation": TotalVariation(),
}
JUDGE = "total variation"  # auto's
Shares = Mapping[str, Sequence[float]]  # by loss: of each expert, K


class Row(NamedTuple):
    """One merge of a suite."""

    title: str
    shares: Shares
    score: float  # the larger, the better


def rows(suite: str) -> list[Row]:
    """The rows that were judged and scored."""
    found: dict[str, Shares] = results.measured(f"shares/{suite}") or {}
    sign = 1 if suite == "text" else -1
    return [
        Row(METHODS[name].title, shares, sign * score[1])
        for name, shares in found.items()
        if (score := scored(suite, name))
    ]


def scored(suite: str, name: str) -> tuple[int, float] | None:
    """The first seed of a row that has a score, and the score."""
    for seed in range(METHODS[name].seeds):
        if found := results.measured(file_of(suite, name, seed)):
            return seed, found["score"]
    return None


def correlation(found: Sequence[Row], loss: str) -> float:
    """Spearman's, of shares and scores."""
    shares = [mean(row.shares[loss]) for row in found]
    return rank_correlation(*torch.tensor([shares, [row.score for row in found]], dtype=torch.float64))


def table() -> str:
    """Markdown: Spearman's correlation by loss, and the row that each loss would choose."""
    lines = ["| experts | judged by | Spearman | highest share | its gap closed | best gap closed |"]
    lines += ["|" + "---|" * 6]
    for suite, setting in SUITES.items():
        if not (found := rows(suite)):
            continue
        title, baselines = f"{TITLES[suite]}, {len(found)} merges", setting.baselines()
        best = setting.gap(abs(max(row.score for row in found)), baselines)
        for loss in LOSSES:
            chosen = max(found, key=lambda row: mean(row.shares[loss]))
            gap = setting.gap(abs(chosen.score), baselines)
            cells = (
                title,
                loss,
                f"{correlation(found, loss):.2f}",
                chosen.title,
                f"{gap:.0%}",
                f"{best:.0%}",
            )
            lines.append(f"| {' | '.join(cells)} |")
            title = ""
    return "\n".join(lines)


def changes_of(name: str, seed: int) -> dict[str, Any]:
    """What a row changes of the suite's configuration, by key."""
    pairs = (option.removeprefix("--").partition("=") for option in options_of(METHODS[name], seed))
    return {key: yaml.safe_load(value) for key, _, value in pairs}


def learned(suite: str, name: str, seed: int) -> Path:
    """The coefficients that a row learned; fitted again if no run folder has them."""
    for run in (CLOSED / suite / f"{name}-{seed}", RUNS / suite / f"{name}-{seed}"):
        if (file := run / "coefficients.safetensors").exists():
            return file
    made = from_config(f"configs/{SUITES[suite].config}", run, changes_of(name, seed))
    fit(made.module, made.data, made.trainer, made.run, made.resume, config=made.text)
    return file


def judged(suite: str, name: str, seed: int) -> Shares:
    """What a row recovers of each expert."""
    config, changes = f"configs/{SUITES[suite].config}", changes_of(name, seed)
    file = learned(suite, name, seed) if changes.get("trainer.max_steps") != 0 else None
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
    kept, made_by = f"shares/{given.suite}", results.fingerprint(SUITES[given.suite].config)
    found = results.recall(kept, made_by) or {}
    for name in given.methods:
        score = scored(given.suite, name)
        if score is not None and name not in found:
            found[name] = judged(given.suite, name, score[0])
            results.keep(kept, made_by, found)
            for heavy in (RUNS / given.suite / "judging/workspace").glob("task_vectors-*"):
                heavy.unlink()
            print(f"{name}: {mean(found[name][JUDGE]):.4f}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
