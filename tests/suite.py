"""`make suite`: every published recipe and ours on the full text suite, three seeds.

Resumable: fits go on from their run folders, scores are kept in `tests/results`, of which
`tests.result_tables` makes the table of the documentation. Two fits run side by side,
one thread each, which is what two cores do most with.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev

from tests import results
from trainmerge.system.memory import anonymous

RUNS = Path("runs/suite")
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    title: str
    config: str
    continues: str = ""  # another method, whose run this one goes on with
    options: tuple[str, ...] = ("--data.batch_size=4",)


METHODS = {
    "task": Method("AdaMerging, task-wise, as published", "adamerging-task.yaml"),
    "layer": Method("AdaMerging, layer-wise, as published", "adamerging.yaml"),
    "plusplus": Method("AdaMerging++, layer-wise, as published", "adamerging-plusplus.yaml"),
    "guarded": Method("guarded entropy (ours)", "guarded.yaml"),
    "guarded-200": Method(
        "guarded entropy (ours), 200 steps more",
        "guarded.yaml",
        "guarded",
        ("--data.batch_size=4", "--trainer.max_steps=300"),
    ),
    "alignment": Method("alignment with the experts, 64 texts", "expert-merging-text.yaml", options=()),
}


FIRST = [name for name, method in METHODS.items() if not method.continues]
Scores = dict[str, dict[str, float]]


def command(*arguments: str) -> None:
    """Run trainmerge with one thread; its output goes to the terminal only if it fails."""
    watched(*arguments)


def watched(*arguments: str) -> dict[str, float]:
    """`command`, and what it took: CPU seconds, and the peak of anonymous memory in bytes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = [sys.executable, "-m", "trainmerge.cli", *arguments]
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(process, env=environment, stdout=said, stderr=said)
        highest = 0
        while (done := os.wait4(child.pid, os.WNOHANG))[0] == 0:
            highest = max(highest, anonymous(child.pid))
            time.sleep(0.02)
        child.returncode = os.waitstatus_to_exitcode(done[1])
        if child.returncode:
            said.seek(0)
            output = said.read().decode(errors="replace")
            raise SystemExit(f"trainmerge {' '.join(arguments)}\n{output[-6000:]}")
    return {"seconds": done[2].ru_utime + done[2].ru_stime, "bytes": highest}


def score(name: str, seed: int, compare: bool) -> Scores:
    """Fit and evaluate one method with one seed, unless its scores are there."""
    method, run = METHODS[name], RUNS / f"{name}-{seed}"
    options = ("--trainer.precision=bf16-mixed", f"--seed_everything={seed}", *method.options)
    made_by = results.fingerprint(method.config, *options)
    if (found := results.recall(f"suite/{run.name}", made_by)) is not None:
        return found
    if method.continues and not run.exists():
        ignored = shutil.ignore_patterns("scores.json")
        shutil.copytree(RUNS / f"{method.continues}-{seed}", run, ignore=ignored)
    command("fit", "--config", f"configs/{method.config}", "--run", str(run), "--report", "false", *options)
    command("evaluate", str(run), "--compare", str(compare).lower())
    scores: Scores = json.loads((run / "scores.json").read_text())
    results.keep(f"suite/{run.name}", made_by, scores)
    print(f"{run}: {scores['learned']['mean']:.4f}", file=sys.stderr, flush=True)
    return scores


def chain(name: str, seed: int, compare: bool) -> None:
    """A method and those that go on with its run, one after another."""
    score(name, seed, compare)
    for other, method in METHODS.items():
        if method.continues == name:
            score(other, seed, False)


def table(rows: dict[str, list[Scores]]) -> str:
    """Markdown: methods down, tasks across, mean and spread over the seeds."""
    baselines = next(scores for runs in rows.values() for scores in runs if "expert" in scores)
    expert = baselines["expert"]
    tasks = [task for task in expert if task not in ("mean", "normalised")]
    head = ["accuracy", *tasks, "mean", "norm.", "seeds"]

    def row(title: str, scores: list[dict[str, float]]) -> str:
        relative = mean(mean(s[task] / expert[task] for task in tasks) for s in scores)
        spread = f" ± {pstdev([s['mean'] for s in scores]):.3f}" if len(scores) > 1 else ""
        cells = [f"{mean(s[task] for s in scores):.3f}" for task in tasks]
        overall = f"{mean(s['mean'] for s in scores):.3f}{spread}"
        return f"| {' | '.join([title, *cells, overall, f'{relative:.3f}', str(len(scores))])} |"

    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [
        row(title, [scores]) for title, scores in baselines.items() if title not in ("learned", "expert")
    ]
    lines += [row(METHODS[name].title, [r["learned"] for r in runs]) for name, runs in rows.items()]
    return "\n".join([*lines, row("each task's own expert", [expert])])


def measured() -> dict[str, list[Scores]]:
    """Every row's scores, a seed each, of what was measured."""
    found = {name: [results.measured(f"suite/{name}-{seed}") for seed in SEEDS] for name in METHODS}
    rows = {name: [scores for scores in runs if scores is not None] for name, runs in found.items()}
    return {name: runs for name, runs in rows.items() if runs}


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=FIRST, default=FIRST)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    jobs = [(name, seed) for seed in given.seeds for name in given.methods]
    compared = any('"expert"' in file.read_text() for file in results.FOLDER.glob("suite/*.json"))
    with ThreadPoolExecutor(given.workers) as pool:
        list(pool.map(lambda job: chain(job[0], job[1], not compared and job == jobs[0]), jobs))


if __name__ == "__main__":
    main()
