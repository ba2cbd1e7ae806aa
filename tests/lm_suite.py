"""`make suite-lm`: Expert Merging and ++ on SmolLM2-135M, three seeds, and how many examples it takes.

Resumable, as `tests.suite`: fits go on from their run folders, what was measured is kept in `tests/results`,
of which `tests.result_tables` makes the tables of the documentation.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from math import log
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from tests import results
from tests.suite import Scores, command, watched

RUNS = Path("runs/lm-suite")
SEEDS = (0, 1, 2)
PUBLISHED_SEEDS = 1  # its rows take as long as all others of a seed
COUNTS = (1, 2, 5, 10, 50)
ALL = 10  # examples an expert in every other row
DOCUMENTS = 24  # test documents a domain
OURS, PUBLISHED = "expert-merging-fast", "expert-merging"
ENTROPY_RATE = "--model.optimizer.init_args.lr=0.02"
KEEP = "--model.keep_better=true"
Measured = dict[str, Any]  # "scores", the fit's "cost", the loss of each of its "passes"
TITLES = {
    "published": "Expert Merging, the reference code's optimiser, 50 steps",
    "fast": "Expert Merging, our recipe, 40 steps",
    "plusplus": "Expert Merging++, 30 steps from there",
    "ties": "TIES, sum, 0.3",
    "entropy": "entropy, layer-wise (AdaMerging), 40 steps",
}


def score(name: str, config: str, *options: str, compare: bool = False) -> Measured:
    """Fit and evaluate, unless that was done: scores, the fit's cost, and the loss of each pass."""
    run, made_by = RUNS / name, results.fingerprint(f"{config}.yaml", *options)
    if (found := results.recall(f"lm-suite/{name}", made_by)) is not None:
        return found
    cost = watched(
        "fit", "--config", f"configs/{config}.yaml", "--run", str(run), "--report", "false", *options
    )
    command("evaluate", str(run), "--limit", str(DOCUMENTS), "--compare", str(compare).lower())
    scores: Scores = json.loads((run / "scores.json").read_text())
    measured = {"scores": scores, "cost": cost, "passes": _passes(run / "metrics.jsonl")}
    results.keep(f"lm-suite/{name}", made_by, measured)
    print(f"{run}: {scores['learned']['mean']:.3f}", file=sys.stderr, flush=True)
    return measured


def plusplus(seed: int) -> Measured:
    """The second stage, from our recipe's run of this seed."""
    name, first, chunks = f"plusplus-{seed}", RUNS / f"fast-{seed}", RUNS / f"chunks-{seed}.json"
    options = (
        KEEP,
        f"--seed_everything={seed}",
        "--recipe.grouping.granularity=chunk",
        f"--recipe.grouping.chunks={chunks}",
        f"--model.initial={first}/coefficients.safetensors",
        "--model.optimizer.init_args.lr=0.02",
        "--model.lr_scheduler.init_args.T_max=30",
        "--trainer.max_steps=30",
    )
    known = results.recall(f"lm-suite/{name}", results.fingerprint(f"{OURS}.yaml", *options))
    if known is None and not chunks.exists():
        command("allocate", str(first), str(chunks), "--budget", "1.0", "--kappa", "1")
    return known or score(name, OURS, *options)


def run_all() -> None:
    """Measure what is missing: every row's runs, a seed each, and our recipe on other counts of examples."""
    seed_of = [f"--seed_everything={seed}" for seed in SEEDS]
    for s in SEEDS:
        score(f"fast-{s}", OURS, KEEP, seed_of[s], compare=s == 0)
        plusplus(s)
        score(f"entropy-{s}", OURS, "--model.objective=Entropy", ENTROPY_RATE, seed_of[s])
    for s in SEEDS[:PUBLISHED_SEEDS]:
        score(f"published-{s}", PUBLISHED, "--trainer.precision=bf16-mixed", seed_of[s])
    score("ties", OURS, "--trainer.max_steps=0", '--recipe.preprocess=[{"class_path":"Ties"}]')
    for count in COUNTS:
        if count != ALL:
            score(f"n{count}", OURS, KEEP, f"--data.max_examples={count}")


def measured() -> dict[str, list[Measured]]:
    """Every row's runs, a seed each, of what was measured; `n1`, `n2`, ... with other counts of examples."""
    names = {row: [row, *(f"{row}-{seed}" for seed in SEEDS)] for row in TITLES}
    names |= {f"n{count}": [f"n{count}"] for count in COUNTS if count != ALL}
    found = {row: [results.measured(f"lm-suite/{name}") for name in all_of] for row, all_of in names.items()}
    return {row: [run for run in runs if run is not None] for row, runs in found.items()}


def closed(scores: dict[str, float], baselines: Scores) -> float:
    """The share of the gap between base and experts that is closed, in logs of geometric means."""
    base, expert = (log(baselines[row]["mean"]) for row in ("base", "expert"))
    return (base - log(scores["mean"])) / (base - expert)


def table(rows: dict[str, list[Measured]]) -> str:
    """Markdown: methods down, domains across; memory is the whole process's, CPU seconds are its fit's."""
    baselines: Scores = rows["fast"][0]["scores"]
    domains = [name for name in baselines["expert"] if name not in ("mean", "normalised")]
    lines = [
        f"| perplexity | {' | '.join([*domains, 'geometric mean', 'gap closed', 'seeds', 'CPU s', 'GB'])} |",
        "|---" * (len(domains) + 6) + "|",
    ]

    def row(title: str, scores: Sequence[dict[str, float]], cost: Sequence[str] = ("", "")) -> str:
        cells = [f"{mean(s[domain] for s in scores):.2f}" for domain in domains]
        shares = [closed(s, baselines) for s in scores]
        spread = f" ± {pstdev(shares):.3f}" if len(scores) > 1 else ""
        cells += [
            f"{mean(s['mean'] for s in scores):.2f}",
            f"{mean(shares):.3f}{spread}",
            str(len(scores)),
            *cost,
        ]
        return f"| {title} | {' | '.join(cells)} |"

    plain = [name for name in baselines if name not in ("learned", "expert")]
    lines += [row(name, [baselines[name]]) for name in plain]
    lines += [
        row(title, [run["scores"]["learned"] for run in rows[name]], _cost(rows[name]))
        for name, title in TITLES.items()
    ]
    return "\n".join([*lines, row("each domain's own expert", [baselines["expert"]])])


def _cost(runs: Sequence[Measured]) -> tuple[str, str]:
    """CPU seconds and memory of a row's fits; the second stage's without the first's."""
    costs = [run["cost"] for run in runs if "cost" in run]
    return f"{mean(c['seconds'] for c in costs):.0f}", f"{max(c['bytes'] for c in costs) / 1e9:.2f}"


def curve(rows: dict[str, list[Measured]]) -> str:
    """Markdown: what 1, 2, 5, 10, 50 examples per expert give."""
    baselines: Scores = rows["fast"][0]["scores"]
    cells = []
    for count in COUNTS:
        learned = rows["fast" if count == ALL else f"n{count}"][0]["scores"]["learned"]
        cells.append((f"{learned['mean']:.2f}", f"{closed(learned, baselines):.3f}"))
    head = "| examples per expert | " + " | ".join(map(str, COUNTS)) + " |"
    lines = [
        f"| {title} | {' | '.join(cell[i] for cell in cells)} |"
        for i, title in enumerate(["geometric mean", "gap closed"])
    ]
    return "\n".join([head, "|---" * (len(COUNTS) + 1) + "|", *lines])


def losses(rows: dict[str, list[Measured]]) -> str:
    """Markdown: the loss of each pass over the 10 examples per expert, seed 0."""
    passes: dict[str, list[float]] = {name: rows[name][0]["passes"] for name in ("published", "fast")}
    width = max(map(len, passes.values()))
    head = "| steps | " + " | ".join(f"{10 * i + 1} to {10 * i + 10}" for i in range(width)) + " |"
    lines = [
        f"| {TITLES[name]} | {' | '.join(f'{loss:.3f}' for loss in row)}{' |' * (width - len(row))} |"
        for name, row in passes.items()
    ]
    return "\n".join([head, "|---" * (width + 1) + "|", *lines])


def _passes(metrics: Path) -> list[float]:
    logged = [json.loads(line) for line in metrics.read_text().splitlines()]
    found = [row["loss"] for row in logged if "loss" in row]
    return [mean(found[first : first + 10]) for first in range(0, len(found), 10)]


def main() -> None:
    """Run what is missing."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    run_all()


if __name__ == "__main__":
    main()
