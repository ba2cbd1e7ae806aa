"""The rows of `make suite-closed`: merges without learning, and learning from the best of them."""

from dataclasses import dataclass
from typing import Any

Steps = tuple[tuple[str, dict[str, Any]], ...]


@dataclass(frozen=True)
class Method:
    """One row: what is done to the task vectors, the coefficients, and what is learned from there."""

    title: str
    steps: Steps
    coefficient: float
    options: tuple[str, ...] = ("--trainer.max_steps=0",)
    suites: tuple[str, ...] = ("text", "lm")
    seeds: int = 1


ASWUDI: Steps = (("Wudi", {}),)
TSV: Steps = (("Tsv", {}),)
TIES: Steps = (("Ties", {}),)
FUSED: tuple[str, dict[str, Any]] = ("Ties", {"density": 1.0, "merge": "mean"})
LEARN: tuple[str, ...] = ()  # the suite's own steps: alignment
CHUNKS = ("--recipe.grouping.granularity=chunk", "--recipe.grouping.chunks=8")
LONGER = (
    "--data.max_examples=64", "--trainer.max_steps=80", "--model.lr_scheduler.init_args.T_max=80",
)  # fmt: skip
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
        "alignment from OptMerge, 8 chunks per tensor", (("OptMerge", {}),), 1.0, CHUNKS, seeds=3
    ),
    "alignment-regmean++": Method(
        "alignment from RegMean++", (("RegMean", {"sequential": True}),), 1.0, LEARN, ("lm",)
    ),
    "alignment-doge-am": Method(
        "alignment from DOGE-AM", (("Doge", {"solver": "adam", "separate": True}),), 0.3, LEARN
    ),
    "alignment-doge-am-chunks": Method(
        "alignment from DOGE-AM, 8 chunks per tensor, 64 texts, 80 steps",
        (("Doge", {"solver": "adam", "separate": True}),),
        0.3,
        (*CHUNKS, *LONGER),
        ("lm",),
        seeds=3,
    ),
    "alignment-projected": Method("alignment, projected gradients", (), 0.3, ("--model.subspace=6",)),
    "guarded-ties": Method("guarded entropy from TIES", TIES, 0.3, GUARDED, ("text",)),
    "guarded-tsv": Method("guarded entropy from TSV-M", TSV, 1.0, GUARDED, ("text",)),
    "guarded-aswudi": Method("guarded entropy from ASWUDI", ASWUDI, 1.0, GUARDED, ("text",)),
    "guarded-projected": Method(
        "guarded entropy, projected gradients", (), 0.3, ("--model.subspace=6", *GUARDED), ("text",)
    ),
}
