"""`make suite-vision`: AdaMerging as published and ours on pictures: DINOv2 ViT-S/14, four tasks, 3 seeds.

Resumable, as `tests.suite`. Best task arithmetic is chosen on the test pictures, so that row is an oracle's.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev

import torch

from tests import results
from tests.suite import Scores, command
from tests.vision_starts import settings, settled
from trainmerge.evaluate import evaluate_run

CONFIG = "pictures.yaml"
RUNS = Path("runs/vision-suite")
SEEDS = (0, 1, 2)
MIXED = ("--trainer.precision=bf16-mixed",)
GRID = (0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class Method:
    """One row of the table, by its options beside the configuration."""

    title: str
    options: tuple[str, ...] = ()
    seeds: tuple[int, ...] = SEEDS
    searched: bool = False  # on held-out pictures, by `tests.vision_starts`


ENTROPY = ("--model.objective=trainmerge.Entropy",)
ONCE = (0,)
SMALL = (
    "--model.initial=0.1",
    "--model.optimizer.init_args.lr=0.02",
    "--model.lr_scheduler.init_args.T_max=60",
    "--trainer.max_steps=60",
    "--data.max_examples=128",
    "--data.batch_size=8",
)
METHODS = {
    "published": Method(
        "AdaMerging, layer-wise, as published",
        (
            *ENTROPY,
            "--model.initial=0.3",
            "--model.optimizer.init_args.lr=0.001",
            "--model.lr_scheduler=null",
            "--trainer.max_steps=500",
        ),
        seeds=ONCE,
    ),
    "adamerging-0.2": Method(
        "AdaMerging, layer-wise, from 0.2, 100 steps at 0.005",
        (
            *ENTROPY,
            "--model.initial=0.2",
            "--model.optimizer.init_args.lr=0.005",
            "--model.lr_scheduler=null",
            "--trainer.max_steps=100",
        ),
        seeds=ONCE,
    ),
    "guarded": Method("guarded entropy (ours)", (*ENTROPY, "--model.objective.agreement=5.0")),
    "alignment": Method("alignment with the experts (ours)", ()),
    "alignment-small": Method("alignment from 0.1, 128 pictures, 60 steps at 0.02 (ours)", SMALL),
    "hidden": Method(
        "alignment of logits and last hidden states (ours)",
        (
            "--model.objective.hidden=1.0",
            "--model.initial=0.2",
            "--data.max_examples=128",
            "--trainer.max_steps=60",
            "--model.lr_scheduler.init_args.T_max=60",
        ),
    ),
    "alignment-optmerge": Method(
        "alignment from OptMerge (ours)",
        ('--recipe.preprocess=[{"class_path": "trainmerge.OptMerge"}]', "--model.initial=1.0"),
    ),
    "tsv-m": Method("TSV-M, searched scale", seeds=ONCE, searched=True),
    "ties": Method("TIES, searched scale", seeds=ONCE, searched=True),
    "iso-c": Method("Iso-C, searched scale", seeds=ONCE, searched=True),
    "optmerge": Method("OptMerge, searched scale", searched=True),
    "aswudi": Method("ASWUDI, searched scale", seeds=ONCE, searched=True),
    "least-squares": Method("layer least squares, searched scale", seeds=ONCE, searched=True),
    "least-squares-sequence": Method(
        "layer least squares in sequence, searched scale", seeds=ONCE, searched=True
    ),
    "auto": Method("`trainmerge auto` (ours)", seeds=ONCE, searched=True),
}


def score(name: str, seed: int, compare: bool) -> None:
    """Fit and evaluate one method with one seed, unless its scores are there."""
    method, run, config = METHODS[name], RUNS / f"{name}-{seed}", Path("configs", CONFIG)
    options: tuple[str, ...] = (*MIXED, f"--seed_everything={seed}", *method.options)
    made_by = results.fingerprint(CONFIG, *options)
    if method.searched:
        made_by = results.fingerprint(settings(config), "searched", *([str(seed)] if seed else []))
    if results.recall(f"vision/{run.name}", made_by) is not None:
        return
    if method.searched:
        made = settled(name, config, RUNS, seed)
    else:
        made = run
        command("fit", "--config", str(config), "--run", str(run), "--report", "false", *options)
    evaluation = evaluate_run(made, grid=GRID, compare=compare)
    run.mkdir(parents=True, exist_ok=True)
    evaluation.write_scores(run / "scores.json")
    scores: Scores = json.loads((run / "scores.json").read_text())
    results.keep(f"vision/{run.name}", made_by, scores)
    print(f"{run}: {scores['learned']['mean']:.4f}", file=sys.stderr, flush=True)


def measured() -> dict[str, list[Scores]]:
    """Every row's scores, a seed each, of what was measured."""
    found = {
        name: [results.measured(f"vision/{name}-{seed}") for seed in method.seeds]
        for name, method in METHODS.items()
    }
    rows = {name: [scores for scores in runs if scores is not None] for name, runs in found.items()}
    return {name: runs for name, runs in rows.items() if runs}


def table(rows: dict[str, list[Scores]]) -> str:
    """Markdown: methods down; tasks, mean, share of the gap and seeds across."""
    baselines = next((scores for runs in rows.values() for scores in runs if "expert" in scores), None)
    if baselines is None:
        return ""
    tasks = [task for task in baselines["expert"] if task not in ("mean", "normalised")]
    best = next(scores["mean"] for row, scores in baselines.items() if row.startswith("task arithmetic"))
    gap = baselines["expert"]["mean"] - best

    def row(title: str, scores: list[dict[str, float]]) -> str:
        means = [s["mean"] for s in scores]
        spread = f" ± {pstdev(means):.3f}" if len(means) > 1 else ""
        cells = [f"{mean(s[task] for s in scores):.3f}" for task in tasks]
        overall = [f"{mean(means):.3f}{spread}", f"{(mean(means) - best) / gap:z.0%}", str(len(means))]
        return f"| {' | '.join([title, *cells, *overall])} |"

    head = ["accuracy", *tasks, "mean", "gap", "seeds"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [row(title, [own]) for title, own in baselines.items() if title not in ("learned", "expert")]
    lines += [row(METHODS[name].title, [r["learned"] for r in runs]) for name, runs in rows.items()]
    return "\n".join([*lines, row("each task's own expert", [baselines["expert"]])])


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    for seed in given.seeds:
        for name in given.methods:
            compared = any('"expert"' in file.read_text() for file in results.FOLDER.glob("vision/*.json"))
            if seed in METHODS[name].seeds:
                score(name, seed, not compared)


if __name__ == "__main__":
    main()
