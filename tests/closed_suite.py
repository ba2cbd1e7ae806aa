"""`make suite-closed`: every merge without learning, and learning from the best of them, on both suites.

One seed, or as many as a row says. Resumable, as `tests.suite`: scores, seconds and memory are kept in
`tests/results`, of which `tests.result_tables` makes the table of the documentation.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import log
from pathlib import Path
from statistics import mean, pstdev

from tests import results
from tests.closed_methods import METHODS, Method
from tests.lm_suite import DOCUMENTS
from tests.suite import Scores, command, watched

RUNS = Path("runs/closed-suite")


@dataclass(frozen=True)
class Suite:
    """Models and data to merge."""

    config: str
    runs: str  # the suite that has the baselines
    limit: int  # test examples a task; 0 is all
    scale: Callable[[float], float]  # in which shares of a gap are taken

    def baselines(self) -> Scores:
        """The scores of a run that was compared with base, task arithmetic and experts."""
        for file in sorted((results.FOLDER / self.runs).glob("*.json")):
            found = json.loads(file.read_text())["measured"]
            scores: Scores = found.get("scores", found)
            if "expert" in scores:
                return scores
        raise SystemExit(f"{self.runs}: no run with baselines yet; run its own suite first")

    def gap(self, score: float, baselines: Scores) -> float:
        """The share of the way from the best task arithmetic to the experts."""
        best = next(scores["mean"] for row, scores in baselines.items() if row.startswith("task arithmetic"))
        start, end = self.scale(best), self.scale(baselines["expert"]["mean"])
        return (self.scale(score) - start) / (end - start)


SUITES = {
    "text": Suite("expert-merging-text.yaml", "suite", 0, float),
    "lm": Suite("expert-merging-fast.yaml", "lm-suite", DOCUMENTS, log),
}


def options_of(method: Method, seed: int = 0) -> tuple[str, ...]:
    """What a fit of it is given beside the suite's configuration; the first seed is the configuration's."""
    steps = [{"class_path": f"trainmerge.{c}", "init_args": given} for c, given in method.steps]
    return (
        f"--recipe.preprocess={json.dumps(steps)}",
        f"--model.initial={method.coefficient}",
        *method.options,
        *((f"--seed_everything={seed}",) if seed else ()),
    )


def file_of(suite_name: str, name: str, seed: int) -> str:
    """Where the result of one seed is kept."""
    return f"closed/{suite_name}-{name}" + (f"-{seed}" if seed else "")


def known(suite_name: str, name: str, seed: int) -> dict[str, float] | None:
    """What was measured of one method."""
    made_by = results.fingerprint(SUITES[suite_name].config, *options_of(METHODS[name], seed))
    return results.recall(file_of(suite_name, name, seed), made_by)


def measured(suite_name: str, name: str) -> list[dict[str, float]]:
    """What was measured of one method, whatever its configuration is by now, a seed each."""
    found = [results.measured(file_of(suite_name, name, seed)) for seed in range(METHODS[name].seeds)]
    return [one for one in found if one is not None]


def measure(suite_name: str, name: str, seed: int) -> None:
    """Keep score, seconds and memory of one method."""
    suite, method = SUITES[suite_name], METHODS[name]
    run, options = RUNS / suite_name / f"{name}-{seed}", options_of(method, seed)
    fit = watched(
        "fit", "--config", f"configs/{suite.config}", "--run", str(run), "--report", "false", *options
    )
    export = watched("export", str(run), str(run / "merged"), "--overwrite", "true")
    command("evaluate", str(run), "--limit", str(suite.limit), "--compare", "false")
    score = json.loads((run / "scores.json").read_text())["learned"]["mean"]
    seconds, memory = fit["seconds"] + export["seconds"], max(fit["bytes"], export["bytes"])
    found = {"score": score, "seconds": seconds, "bytes": memory}
    results.keep(file_of(suite_name, name, seed), results.fingerprint(suite.config, *options), found)
    for heavy in [*run.glob("merged/*.safetensors"), *run.glob("workspace/*.safetensors")]:
        heavy.unlink()
    print(f"{suite_name} {name} {seed}: {score:.4f}", file=sys.stderr, flush=True)


def table() -> str:
    """Markdown: methods down; score, gap, seconds and memory of each suite across.

    Cells are empty where a suite was not measured; a method without any is in one last row.
    """
    head = "| method | accuracy | gap | CPU s | GB | perplexity | gap | CPU s | GB |"
    baselines = {name: suite.baselines() for name, suite in SUITES.items()}

    def cells(suite: str, name: str) -> list[str]:
        if not (found := measured(suite, name)):
            return [""] * 4
        digits = 3 if suite == "text" else 2
        gaps = [SUITES[suite].gap(one["score"], baselines[suite]) for one in found]
        spread = f" ± {pstdev(gaps):.0%}, {len(gaps)} seeds" if len(gaps) > 1 else ""
        score, seconds = (mean(one[of] for one in found) for of in ("score", "seconds"))
        memory = max(one["bytes"] for one in found)
        return [f"{score:.{digits}f}", f"{mean(gaps):z.0%}{spread}", f"{seconds:.0f}", f"{memory / 1e9:.2f}"]

    lines = [
        f"| {' | '.join([method.title, *cells('text', name), *cells('lm', name)])} |"
        for name, method in METHODS.items()
        if any(measured(suite, name) for suite in SUITES)
    ]
    missing = [
        method.title for name, method in METHODS.items() if not any(measured(suite, name) for suite in SUITES)
    ]
    lines += [f"| not run: {'; '.join(missing)}{' |' * 9}"] if missing else []
    return "\n".join([head, "|---" * 9 + "|", *lines])


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suites", nargs="+", choices=list(SUITES), default=list(SUITES))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    given = parser.parse_args()
    for suite in given.suites:
        for name in given.methods:
            for seed in range(METHODS[name].seeds if suite in METHODS[name].suites else 0):
                if known(suite, name, seed) is None:
                    measure(suite, name, seed)


if __name__ == "__main__":
    main()
