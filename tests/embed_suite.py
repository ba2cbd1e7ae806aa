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


def score(seed: int, compare: bool) -> Scores:
    """Fit and evaluate one seed, unless its scores are there."""
    run, option = RUNS / f"similarity-{seed}", f"--seed_everything={seed}"
    made_by = results.fingerprint(CONFIG, option, f"pairs={PAIRS}")
    if (found := results.recall(f"embed-suite/{run.name}", made_by)) is not None:
        return found
    command("fit", "--config", f"configs/{CONFIG}", "--run", str(run), "--report", "false", option)
    evaluation = tm.evaluate_run(run, limit=PAIRS, grid=GRID, compare=compare)
    scores: Scores = {row: {**own, "mean": evaluation.means()[row]} for row, own in evaluation.scores.items()}
    results.keep(f"embed-suite/{run.name}", made_by, scores)
    print(f"{run}: {scores['learned']['mean']:.4f}", file=sys.stderr, flush=True)
    return scores


def measured() -> list[Scores]:
    """The scores of every seed that was measured."""
    found = [results.measured(f"embed-suite/similarity-{seed}") for seed in SEEDS]
    return [scores for scores in found if scores is not None]


def table(runs: list[Scores]) -> str:
    """Markdown: merges down, kinds of pairs across; the share of the gap between base and experts last."""
    baselines = next(scores for scores in runs if "expert" in scores)
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
    lines.append(row(f"similarity (ours), seeds: {len(runs)}", [scores["learned"] for scores in runs]))
    return "\n".join([*lines, row("each kind's own expert", [baselines["expert"]])])


def main() -> None:
    """Run what is missing."""
    compared = any("expert" in scores for scores in measured())
    for seed in SEEDS:
        score(seed, compare=not compared and seed == SEEDS[0])


if __name__ == "__main__":
    main()
