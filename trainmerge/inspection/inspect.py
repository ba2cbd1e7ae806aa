"""`trainmerge inspect`: headers and texts first, then the weights, then a suggested configuration."""

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import yaml

from trainmerge.coefficients.coefficients import Coefficients, load_coefficients
from trainmerge.inspection.attention import attention_findings
from trainmerge.inspection.console import (
    parameter_counts,
    print_coefficients,
    print_findings,
    print_geometry,
    print_parameters,
    print_sources,
    print_suggestion,
)
from trainmerge.inspection.findings import Finding, Texts, header_findings, read_texts
from trainmerge.inspection.suggest import Suggestion, suggest, write_suggestion
from trainmerge.inspection.weights import preprocess_findings, weight_findings
from trainmerge.run.folder import RunFolder
from trainmerge.run.open_run import read_run
from trainmerge.run.recipe import Opened, Recipe
from trainmerge.run.sources import recipe_of
from trainmerge.system.atomic import write_whole
from trainmerge.task_vectors.geometry import Geometry, measure_geometry

CHEAP = 2 << 30  # bytes of weights that `auto` reads

Weights = Literal["auto", "yes", "no"]


def inspect_path(
    path: Path,
    every: bool = False,
    weights: Weights = "auto",
    suggestion: Path | None = None,
    output: Path | None = None,
) -> list[Finding]:
    """Print what a configuration, run or exported checkpoint merges, and possible problems.

    Args:
        path: A configuration, a run folder, or an exported checkpoint.
        every: List every parameter.
        weights: Whether to read the weights too; `auto` reads up to 2 GiB.
        suggestion: Where to write a suggested configuration.
        output: Where to write the results as JSON.

    Raises:
        ValueError: base and experts do not match; lists every mismatch.
        FileExistsError: `suggestion` already exists.
    """
    recipe = recipe_of(path)
    with warnings.catch_warnings(record=True) as words:
        warnings.simplefilter("always")
        opened = recipe.open(RunFolder(path).workspace if path.is_dir() else None)
    findings = [Finding("warning", str(word.message)) for word in words]
    coefficients = _coefficients(path)
    print_sources(recipe, opened)
    print_parameters(opened, every)
    findings += header_findings(recipe, opened)
    texts = read_texts(recipe, _column(path))
    findings += texts.findings
    geometry, measured = _measured(opened, weights)
    findings += measured
    findings += preprocess_findings(recipe, opened, geometry)
    if geometry is not None:
        print_geometry(opened.task_vectors.experts, geometry)
    print_findings(findings)
    if coefficients is not None:
        print_coefficients(coefficients)
    suggested = suggest(recipe, {name: len(own) for name, own in texts.calibration.items()}, geometry)
    if suggestion is not None:
        write_suggestion(suggested, suggestion)
    if suggestion is not None or path.is_file():
        print_suggestion(suggested, suggestion)
    if output is not None:
        content = _as_json(recipe, opened, texts, findings, geometry, suggested)
        write_whole(output, json.dumps(content, indent=1))
    return findings


def _measured(opened: Opened, weights: Weights) -> tuple[Geometry | None, list[Finding]]:
    """The task vectors' geometry and the findings from it; neither, if the weights are not read."""
    needed = weight_bytes(opened)
    if weights == "no" or (weights == "auto" and needed > CHEAP):
        what = f"{needed / 2**30:.1f} GiB of weights were not read, so they were not checked"
        return None, [Finding("note", what, "--weights yes reads them")]
    geometry = measure_geometry(opened.task_vectors)
    experts = opened.task_vectors.experts
    findings = [
        *weight_findings(experts, geometry),
        *attention_findings(opened.base, opened.task_vectors),
    ]
    return geometry, findings


def weight_bytes(opened: Opened) -> int:
    """Bytes of base and experts that one pass over the task vectors reads."""
    return sum(delta.nbytes for delta in opened.task_vectors.deltas.values())


def _coefficients(path: Path) -> Coefficients | None:
    """The coefficients of a run folder or an export; None for others."""
    run, exported = RunFolder(path), path / "trainmerge_coefficients.safetensors"
    if run.manifest.is_file() and run.coefficients.is_file():
        return read_run(run)[1]
    return load_coefficients(exported) if exported.is_file() else None


def _column(path: Path) -> str:
    """The text column of a configuration, or of a run's."""
    for file in (path / "config.yaml", path / "trainmerge_config.yaml", path):
        if file.is_file():
            data = (yaml.safe_load(file.read_text()) or {}).get("data") or {}
            columns = data.get("columns") or {}
            return str(columns.get("messages") or columns.get("text") or "text")
    return "text"


def _as_json(
    recipe: Recipe,
    opened: Opened,
    texts: Texts,
    findings: list[Finding],
    geometry: Geometry | None,
    suggested: Suggestion,
) -> dict[str, Any]:
    experts = list(opened.task_vectors.experts)
    content: dict[str, Any] = {
        "base": recipe.base,
        "experts": {name: expert.path for name, expert in recipe.experts.items()},
        "examples": {name: len(own) for name, own in texts.calibration.items()},
        **parameter_counts(opened),
        "findings": [asdict(finding) for finding in findings],
        "suggestion": {"settings": suggested.settings, "reasons": suggested.reasons},
    }
    if geometry is not None:
        whole = geometry.of(geometry.names)
        content["geometry"] = {
            "experts": experts,
            "relative_norms": whole.relative_norms()[0].tolist(),
            "cosines": whole.cosines()[0].tolist(),
            "opposed": whole.conflicts()[0].tolist(),
        }
    return content
