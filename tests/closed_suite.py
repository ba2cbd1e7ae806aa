"""`make suite-closed`: every merge without learning, and learning from the best of them, on both suites.

One seed. Resumable, as `tests.suite`: scores, seconds and memory are kept in `tests/results`, of which
`tests.result_tables` makes the table of the documentation.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

from tests import results
from tests.lm_suite import DOCUMENTS
from tests.suite import Scores, command, watched

RUNS = Path("runs/closed-suite")
Steps = tuple[tuple[str, dict[str, Any]], ...]


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


@dataclass(frozen=True)
class Method:
    """One row: what is done to the task vectors, the coefficients, and what is learned from there."""

    title: str
    steps: Steps
    coefficient: float
    options: tuple[str, ...] = ("--trainer.max_steps=0",)
    suites: tuple[str, ...] = ("text", "lm")


ASWUDI: Steps = (("Wudi", {}),)
TSV: Steps = (("Tsv", {}),)
TIES: Steps = (("Ties", {}),)
FUSED: tuple[str, dict[str, Any]] = ("Ties", {"density": 1.0, "merge": "mean"})
LEARN: tuple[str, ...] = ()  # the suite's own steps: alignment
CHUNKS = ("--recipe.grouping.granularity=chunk", "--recipe.grouping.chunks=8")
GUARDED = (
    "--model.objective=trainmerge.Entropy", "--model.objective.agreement=5.0",
    "--model.optimizer.init_args.lr=0.02", "--trainer.max_steps=100",
    "--model.lr_scheduler.init_args.T_max=100", "--data.batch_size=4", "--data.max_examples=256",
)  # fmt: skip
METHODS = {
    "ties": Method("TIES, sum", TIES, 0.3),
    "ties-mean": Method("TIES, mean", (("Ties", {"merge": "mean"}),), 1.0),
    "dare": Method("DARE 0.9", (("Dare", {}),), 0.4),
    "dare-ties": Method("DARE 0.5, TIES", (("Dare", {"drop": 0.5}), ("Ties", {})), 0.3),
    "breadcrumbs": Method("Breadcrumbs", (("Breadcrumbs", {}),), 0.3),
    "consensus": Method("Consensus", (("Consensus", {}),), 0.4),
    "pcb": Method("PCB-Merging", (("Pcb", {}),), 1.5),
    "tsv-m": Method("TSV-M", TSV, 1.0),
    "tsv-c": Method("TSV-C", (("Tsv", {"orthogonal": False}),), 0.4),
    "widen": Method("WIDEN", (("Widen", {}),), 1.0),
    "opcm": Method("OPCM", (("Opcm", {}),), 1.0),
    "model-stock": Method("Model Stock", (("ModelStock", {}),), 1.0),
    "wudi": Method("WUDI, time 300", (("Wudi", {"time": 300.0}),), 1.0),
    "swudi": Method("SWUDI", (("Wudi", {"time": 1300.0, "keep": 0.65}),), 1.0),
    "aswudi": Method("ASWUDI", ASWUDI, 1.0),
    "optmerge": Method("OptMerge", (("OptMerge", {}),), 1.0),
    "doge-ta": Method("DOGE-TA", (("Doge", {}),), 1.0),
    "doge-ta-adam": Method("DOGE-TA, the paper's solver", (("Doge", {"solver": "adam"}),), 1.0),
    "localize": Method("Localize-and-Stitch", (("LocalizeAndStitch", {}),), 1.0),
    "ram": Method("RAM", (("Ram", {}),), 1.0),
    "ram+": Method("RAM+", (("Ram", {"rescale": 0.1}),), 1.0),
    "magmax": Method("MagMax", (("MagMax", {}),), 0.5),
    "della": Method("DELLA", (("Della", {}), FUSED), 1.0),
    "sce": Method("SCE", (("Sce", {}),), 1.0),
    "iso-c": Method("Iso-C", (("Iso", {"common": 1.0}),), 1.0),
    "iso-cts": Method("Iso-CTS", (("Iso", {}),), 1.0),
    "svc": Method("SVC of task arithmetic 0.3", (("Svc", {}),), 1.0),
    "svc-tsv": Method("SVC of TSV-M", (*TSV, ("Svc", {"scale": 1.0})), 1.0),
    "tsv-energy": Method("TSV-M, rank by energy 0.9", (("Tsv", {"energy": 0.9}),), 1.0),
    "karcher": Method("Karcher mean of the task vectors", (("Karcher", {}),), 1.0),
    "knots": Method("KnOTS-TIES", (("Knots", {}),), 1.0),
    "pico": Method("Pico with TIES", (("Pico", {}),), 1.0),
    "core-space": Method("TSV-M in core space", (("CoreSpace", {}),), 1.0),
    "aim-ties": Method("TIES, AIM 0.4", (*TIES, ("Aim", {})), 0.3),
    "regmean": Method("RegMean", (("RegMean", {}),), 1.0),
    "regmean++": Method("RegMean++", (("RegMean", {"sequential": True}),), 1.0),
    "fisher": Method("Fisher", (("Fisher", {}),), 1.0),
    "alignment-ties": Method("alignment from TIES", TIES, 0.3, LEARN),
    "alignment-tsv": Method("alignment from TSV-M", TSV, 1.0, LEARN),
    "alignment-aswudi": Method("alignment from ASWUDI", ASWUDI, 1.0, LEARN),
    "alignment-optmerge": Method("alignment from OptMerge", (("OptMerge", {}),), 1.0, LEARN),
    "alignment-optmerge-chunks": Method(
        "alignment from OptMerge, 8 chunks per tensor", (("OptMerge", {}),), 1.0, CHUNKS
    ),
    "alignment-regmean++": Method(
        "alignment from RegMean++", (("RegMean", {"sequential": True}),), 1.0, LEARN, ("lm",)
    ),
    "alignment-doge-am": Method(
        "alignment from DOGE-AM", (("Doge", {"solver": "adam", "separate": True}),), 0.3, LEARN
    ),
    "alignment-projected": Method("alignment, projected gradients", (), 0.3, ("--model.subspace=6",)),
    "guarded-ties": Method("guarded entropy from TIES", TIES, 0.3, GUARDED, ("text",)),
    "guarded-tsv": Method("guarded entropy from TSV-M", TSV, 1.0, GUARDED, ("text",)),
    "guarded-aswudi": Method("guarded entropy from ASWUDI", ASWUDI, 1.0, GUARDED, ("text",)),
    "guarded-projected": Method(
        "guarded entropy, projected gradients", (), 0.3, ("--model.subspace=6", *GUARDED), ("text",)
    ),
}


def options_of(method: Method) -> tuple[str, ...]:
    """What a fit of it is given beside the suite's configuration."""
    steps = [{"class_path": f"trainmerge.{c}", "init_args": given} for c, given in method.steps]
    return (
        f"--recipe.preprocess={json.dumps(steps)}",
        f"--model.initial={method.coefficient}",
        *method.options,
    )


def known(suite_name: str, name: str) -> dict[str, float] | None:
    """What was measured of one method."""
    made_by = results.fingerprint(SUITES[suite_name].config, *options_of(METHODS[name]))
    return results.recall(f"closed/{suite_name}-{name}", made_by)


def measure(suite_name: str, name: str) -> None:
    """Keep score, seconds and memory of one method."""
    suite, method, run = SUITES[suite_name], METHODS[name], RUNS / suite_name / name
    options = options_of(method)
    fit = watched(
        "fit", "--config", f"configs/{suite.config}", "--run", str(run), "--report", "false", *options
    )
    export = watched("export", str(run), str(run / "merged"), "--overwrite", "true")
    command("evaluate", str(run), "--limit", str(suite.limit), "--compare", "false")
    score = json.loads((run / "scores.json").read_text())["learned"]["mean"]
    seconds, memory = fit["seconds"] + export["seconds"], max(fit["bytes"], export["bytes"])
    measured = {"score": score, "seconds": seconds, "bytes": memory}
    results.keep(f"closed/{suite_name}-{name}", results.fingerprint(suite.config, *options), measured)
    for heavy in [*run.glob("merged/*.safetensors"), *run.glob("workspace/*.safetensors")]:
        heavy.unlink()
    print(f"{suite_name} {name}: {score:.4f}", file=sys.stderr, flush=True)


def table() -> str:
    """Markdown: methods down; score, gap, seconds and memory of each suite across.

    Cells are empty where a suite was not measured; a method without any is in one last row.
    """
    head = "| method | accuracy | gap | CPU s | GB | perplexity | gap | CPU s | GB |"
    baselines = {name: suite.baselines() for name, suite in SUITES.items()}

    def cells(suite: str, name: str) -> list[str]:
        if (found := results.measured(f"closed/{suite}-{name}")) is None:
            return [""] * 4
        digits = 3 if suite == "text" else 2
        gap = SUITES[suite].gap(found["score"], baselines[suite])
        cost = [f"{found['seconds']:.0f}", f"{found['bytes'] / 1e9:.2f}"]
        return [f"{found['score']:.{digits}f}", f"{gap:z.0%}", *cost]

    lines = [
        f"| {' | '.join([method.title, *cells('text', name), *cells('lm', name)])} |"
        for name, method in METHODS.items()
        if any(results.measured(f"closed/{suite}-{name}") for suite in SUITES)
    ]
    missing = [
        method.title
        for name, method in METHODS.items()
        if not any(results.measured(f"closed/{suite}-{name}") for suite in SUITES)
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
            if suite in METHODS[name].suites and known(suite, name) is None:
                measure(suite, name)


if __name__ == "__main__":
    main()
