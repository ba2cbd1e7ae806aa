"""`make suite-lm`: Expert Merging and ++ on SmolLM2-135M, three seeds, and how many examples it takes.

Resumable, as `tests.suite`: fits go on from their run folders, scores are kept in them.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, pstdev

from tests.suite import Scores, command, watched, write_between

RUNS = Path("runs/lm-suite")
SEEDS = (0, 1, 2)
PUBLISHED_SEEDS = 1  # its rows take as long as all others of a seed
COUNTS = (1, 2, 5, 10, 50)
DOCUMENTS = 24  # test documents a domain
OURS, PUBLISHED = "expert-merging-fast", "expert-merging"
ENTROPY_RATE = "--model.optimizer.init_args.lr=0.02"
KEEP = "--model.keep_better=true"
TITLES = {
    "published": "Expert Merging, the reference code's optimiser, 50 steps",
    "fast": "Expert Merging, our recipe, 40 steps",
    "plusplus": "Expert Merging++, 30 steps from there",
    "ties": "TIES, sum, 0.3",
    "entropy": "entropy, layer-wise (AdaMerging), 40 steps",
}


def score(name: str, config: str, *options: str, compare: bool = False) -> Scores:
    """Fit and evaluate, unless the scores are there."""
    run = RUNS / name
    if not (run / "cost.json").exists() and not (run / "scores.json").exists():
        cost = watched("fit", "--config", f"configs/{config}.yaml", "--run", str(run), *options)
        (run / "cost.json").write_text(json.dumps(cost))
    if not (run / "scores.json").exists():
        command("evaluate", str(run), "--limit", str(DOCUMENTS), "--compare", str(compare).lower())
    found: Scores = json.loads((run / "scores.json").read_text())
    return found


def plusplus(seed: int) -> Scores:
    """The second stage, from our recipe's run of this seed."""
    first, chunks = RUNS / f"fast-{seed}", RUNS / f"chunks-{seed}.json"
    if not chunks.exists():
        command("allocate", str(first), str(chunks), "--budget", "1.0", "--kappa", "1")
    options = (
        "--recipe.grouping.granularity=chunk",
        f"--recipe.grouping.chunks={chunks}",
        f"--model.initial={first}/coefficients.safetensors",
        "--model.optimizer.init_args.lr=0.02",
        "--model.lr_scheduler.init_args.T_max=30",
        "--trainer.max_steps=30",
    )
    return score(f"plusplus-{seed}", OURS, KEEP, f"--seed_everything={seed}", *options)


def run_all() -> dict[str, list[Scores]]:
    """Every row's scores, a seed each."""
    seed_of = [f"--seed_everything={seed}" for seed in SEEDS]
    return {
        "fast": [score(f"fast-{s}", OURS, KEEP, seed_of[s], compare=s == 0) for s in SEEDS],
        "plusplus": [plusplus(s) for s in SEEDS],
        "published": [
            score(f"published-{s}", PUBLISHED, "--trainer.precision=bf16-mixed", seed_of[s])
            for s in SEEDS[:PUBLISHED_SEEDS]
        ],
        "ties": [score("ties", OURS, "--trainer.max_steps=0", '--recipe.preprocess=[{"class_path":"Ties"}]')],
        "entropy": [
            score(f"entropy-{s}", OURS, "--model.objective=Entropy", ENTROPY_RATE, seed_of[s])
            for s in SEEDS[:PUBLISHED_SEEDS]
        ],
    }


def closed(scores: dict[str, float], baselines: Scores) -> float:
    """The share of the gap between base and experts that is closed, in logs of geometric means."""
    from math import log

    base, expert = (log(baselines[row]["mean"]) for row in ("base", "expert"))
    return (base - log(scores["mean"])) / (base - expert)


def table(results: dict[str, list[Scores]]) -> str:
    """Markdown: methods down, domains across."""
    baselines = results["fast"][0]
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
        row(title, [r["learned"] for r in results[name]], _cost(name)) for name, title in TITLES.items()
    ]
    return "\n".join([*lines, row("each domain's own expert", [baselines["expert"]])])


def _cost(name: str) -> tuple[str, str]:
    """CPU seconds and memory of a row's fits; the second stage's without the first's."""
    found = [json.loads(file.read_text()) for file in RUNS.glob(f"{name}*/cost.json")]
    return f"{mean(c['seconds'] for c in found):.0f}", f"{max(c['bytes'] for c in found) / 1e9:.2f}"


def curve(results: dict[str, list[Scores]]) -> str:
    """Markdown: what 1, 2, 5, 10, 50 examples an expert give."""
    baselines = results["fast"][0]
    cells = []
    for count in COUNTS:
        name = f"fast-{SEEDS[0]}" if count == 10 else f"n{count}"
        scores = score(name, OURS, KEEP, f"--data.max_examples={count}")
        cells.append((f"{scores['learned']['mean']:.2f}", f"{closed(scores['learned'], baselines):.3f}"))
    head = "| examples an expert | " + " | ".join(map(str, COUNTS)) + " |"
    rows = [
        f"| {title} | {' | '.join(cell[i] for cell in cells)} |"
        for i, title in enumerate(["geometric mean", "gap closed"])
    ]
    return "\n".join([head, "|---" * (len(COUNTS) + 1) + "|", *rows])


def losses() -> str:
    """Markdown: the loss of each pass over the 10 examples an expert, seed 0."""
    rows = {name: _passes(RUNS / f"{name}-0" / "metrics.jsonl") for name in ("published", "fast")}
    width = max(map(len, rows.values()))
    head = "| steps | " + " | ".join(f"{10 * i + 1} to {10 * i + 10}" for i in range(width)) + " |"
    lines = [
        f"| {TITLES[name]} | {' | '.join(f'{loss:.3f}' for loss in row)}{' |' * (width - len(row))} |"
        for name, row in rows.items()
    ]
    return "\n".join([head, "|---" * (width + 1) + "|", *lines])


def _passes(metrics: Path) -> list[float]:
    logged = [json.loads(line) for line in metrics.read_text().splitlines()]
    found = [row["loss"] for row in logged if "loss" in row]
    return [mean(found[first : first + 10]) for first in range(0, len(found), 10)]


def main() -> None:
    """Run what is missing, then write the tables."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    results = run_all()
    for marker, content in (
        ("lm-suite", table(results)),
        ("lm-curve", curve(results)),
        ("lm-loss", losses()),
    ):
        write_between(marker, content)


if __name__ == "__main__":
    main()
