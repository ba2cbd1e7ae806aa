"""The printed output of `trainmerge inspect`."""

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.inspection.findings import Finding
from trainmerge.inspection.suggest import Suggestion
from trainmerge.kernels import Difference, ExpertWeight, LowRank, Quantised, Untouched
from trainmerge.run.opened import Opened
from trainmerge.run.recipe import Recipe
from trainmerge.system.console import print_table
from trainmerge.task_vectors.delta import Delta
from trainmerge.task_vectors.geometry import Geometry

FORMS = {
    Difference: "given",
    ExpertWeight: "full",
    LowRank: "low-rank",
    Quantised: "quantised",
    Untouched: "none",
}


def print_sources(recipe: Recipe, opened: Opened) -> None:
    """Base and experts: their folders, and the form of their changes."""
    rows = [["base", recipe.base, f"{len(opened.base.tensors)} tensors", ""]]
    for k, (name, expert) in enumerate(recipe.experts.items()):
        forms = Counter(FORMS[type(delta.terms[k])] for delta in opened.task_vectors.deltas.values())
        changes = ", ".join(f"{count} {form}" for form, count in forms.items())
        rows.append([name, expert.path, changes, str(expert.calibration or "no calibration data")])
    print_table("base and experts", ["name", "folder", "parameters changed", "calibration"], rows)


def unmerged_parameters(opened: Opened) -> dict[str, str]:
    """Parameter -> why it keeps the base's value."""
    untouched = {
        name: "no expert changes it" for name in opened.base.tensors if name not in opened.task_vectors.deltas
    }
    return {**untouched, **opened.layout.excluded}


def parameter_counts(opened: Opened) -> dict[str, Any]:
    """How many parameters are merged, with how many coefficients, and which are not, as JSON data."""
    deltas, layout = opened.task_vectors.deltas, opened.layout
    return {
        "merged_parameters": len(layout.groups),
        "merged_weights": sum(deltas[name].base.numel() for name in layout.groups),
        "coefficients": len(opened.task_vectors.experts) * len(layout.labels),
        "kept": unmerged_parameters(opened),
    }


def print_parameters(opened: Opened, every: bool) -> None:
    """Parameters with their number of coefficients, or why they keep the base's value."""
    layout, deltas, kept = opened.layout, opened.task_vectors.deltas, unmerged_parameters(opened)
    merged, experts = parameter_counts(opened)["merged_weights"], len(opened.task_vectors.experts)
    print(
        f"{len(layout.groups)} parameters ({merged:,} weights) merged with {experts} x {len(layout.labels)} "
        f"coefficients; {len(kept)} parameters keep the base's value"
    )
    reasons = [[reason, str(count)] for reason, count in Counter(kept.values()).items()]
    if reasons and not every:
        print_table("kept", ["reason", "parameters"], reasons)
    if every:
        rows = [[name, _shape(deltas[name]), str(len(groups))] for name, groups in layout.groups.items()]
        rows += [[name, "", reason] for name, reason in kept.items()]
        print_table("parameters", ["name", "shape", "coefficients"], rows)


def print_geometry(experts: Sequence[str], geometry: Geometry) -> None:
    """Norms of the task vectors and their cosine similarities."""
    whole = geometry.of(geometry.names)
    lengths, cosines = whole.relative_norms()[0].tolist(), whole.cosines()[0].tolist()
    rows = [
        [name, f"{100 * length:.2f}%", *(f"{cosine:.2f}".replace("-0.00", "0.00") for cosine in row)]
        for name, length, row in zip(experts, lengths, cosines, strict=True)
    ]
    print_table("task vectors", ["expert", "norm / base", *(f"cos {name}" for name in experts)], rows)


def print_findings(findings: Sequence[Finding]) -> None:
    """The findings, the most severe first."""
    for level in ("error", "warning", "note"):
        for finding in findings:
            if finding.level == level:
                print(f"{level}: {finding.what}" + (f"; {finding.remedy}" if finding.remedy else ""))
    if not any(finding.level != "note" for finding in findings):
        print("no problems found")


def print_suggestion(suggestion: Suggestion) -> None:
    """The suggested settings, with reasons."""
    rows = [[key, _value(suggestion, key), reason] for key, reason in suggestion.reasons.items()]
    print_table("suggested", ["key", "value", "why"], rows)


def closing_words(path: Path | None) -> str:
    """What to do with a suggestion, the last line of `inspect`; `path` is the file that it was written to."""
    if path is None:
        return "--suggest FILE.yaml writes the suggestion as a configuration"
    return f"written: {path}; next: {shlex.join(['trainmerge', 'fit', str(path), 'runs/first'])}"


def _value(suggestion: Suggestion, key: str) -> str:
    value: Any = suggestion.settings
    while key:  # an expert's name may have dots
        part = max((name for name in value if f"{key}.".startswith(f"{name}.")), key=len)
        value, key = value[part], key[len(part) + 1 :]
    value = value[0] if isinstance(value, list) else value
    return str(value["class_path"]).rpartition(".")[2] if isinstance(value, dict) else str(value)


def print_coefficients(coefficients: Coefficients) -> None:
    """Mean, smallest and largest coefficient of every expert."""
    values = coefficients().detach()
    rows = [
        [name, *(f"{number:.3f}" for number in (row.mean(), row.min(), row.max()))]
        for name, row in zip(coefficients.experts, values, strict=True)
    ]
    print_table("coefficients", ["expert", "mean", "min", "max"], rows)


def _shape(delta: Delta) -> str:
    return " x ".join(map(str, delta.shape)) or "scalar"
