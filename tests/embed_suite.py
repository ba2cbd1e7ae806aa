"""`make suite-embed`: three sentence embedders of MiniLM merged by their similarities, a fit per seed.

Resumable, as `tests.suite`: fits go on from their run folders, what was measured is kept in `tests/results`,
of which `tests.result_tables` makes the table of the documentation. The measure is Spearman's correlation of
the merge's similarities with each expert's, on pairs of texts that no expert and no fit has seen.
"""

import sys
from pathlib import Path
from statistics import mean, pstdev

import trainmerge as tm
from tests import results
from tests.suite import Scores, command

RUNS = Path("runs/embed-suite")
SEEDS = (0,)
PAIRS = 100  # test pairs a task
GRID = (0.4, 0.5)  # task arithmetic
CONFIG = "embedders.yaml"
OPTMERGE = ('--recipe.preprocess=[{"class_path": "trainmerge.OptMerge"}]', "--model.initial=1.0")
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {  # name -> title, options beside the configuration
    "similarity": ("similarity (ours)", ()),
    "optmerge": ("OptMerge", (*OPTMERGE, "--trainer.max_steps=0", "--model.lr_scheduler=null")),
    "similarity-optmerge": ("similarity from OptMerge (ours)", OPTMERGE),
}


def score(name: str, seed: int, compare: bool) -> Scores:
    """Fit and evaluate one method with one seed, unless its scores are there."""
    run, options = RUNS / f"{name}-{seed}", (f"--seed_everything={seed}", *METHODS[name][1])
    made_by = results.fingerprint(CONFIG, *options, f"pairs={PAIRS}")
    if (found := results.recall(f"embed-suite/{run.name}", made_by)) is not None:
        return found
    command("fit", "--config", f"configs/{CONFIG}", "--run", str(run), "--report", "false", *options)
    evaluation = tm.evaluate_run(run, limit=PAIRS, grid=GRID, compare=compare)
    scores: Scores = {row: {**own, "mean": evaluation.means()[row]} for row, own in evaluation.scores.items()}
    results.keep(f"embed-suite/{run.name}", made_by, scores)
    print(f"{run}: {scores['learned']['mean']:.4f}", file=sys.stderr, flush=True)
    return scores


def measured() -> dict[str, list[Scores]]:
    """Every method's scores, a seed each, of what was measured."""
    found = {name: [results.measured(f"embed-suite/{name}-{seed}") for seed in SEEDS] for name in METHODS}
    rows = {name: [scores for scores in runs if scores is not None] for name, runs in found.items()}
    return {name: runs for name, runs in rows.items() if runs}


def table(rows: dict[str, list[Scores]]) -> str:
    """Markdown: merges down, kinds of pairs across; the share of the gap between base and experts last."""
    baselines = next(scores for runs in rows.values() for scores in runs if "expert" in scores)
    kinds = [kind for kind in baselines["expert"] if kind not in ("mean", "normalised")]
    base, expert = baselines["base"]["mean"], baselines["expert"]["mean"]
    uniform = max(scores["mean"] for row, scores in baselines.items() if row not in ("learned", "expert"))

    def row(title: str, scores: list[dict[str, float]]) -> str:
        means = [s["mean"] for s in scores]
        spread = f" ± {pstdev(means):.3f}" if len(scores) > 1 else ""
        cells = [f"{mean(s[kind] for s in scores):.3f}" for kind in kinds]
        gaps = [f"{(mean(means) - low) / (expert - low):.2f}" for low in (base, uniform)]
        return f"| {' | '.join([title, *cells, f'{mean(means):.3f}{spread}', *gaps])} |"

    head = ["Spearman with the expert", *kinds, "mean", "gap from base", "gap from best uniform"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [
        row(title, [scores]) for title, scores in baselines.items() if title not in ("learned", "expert")
    ]
    for name, runs in rows.items():
        title = f"{METHODS[name][0]}, seeds: {len(runs)}"
        lines.append(row(title, [scores["learned"] for scores in runs]))
    return "\n".join([*lines, row("each kind's own expert", [baselines["expert"]])])


def main() -> None:
    """Run what is missing."""
    for seed in SEEDS:
        for name in METHODS:
            compared = any("expert" in scores for runs in measured().values() for scores in runs)
            score(name, seed, compare=not compared)


if __name__ == "__main__":
    main()
