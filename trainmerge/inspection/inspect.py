"""`trainmerge inspect`: headers and texts first, then the weights, then a suggested configuration."""

import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from trainmerge.align import Align
from trainmerge.checkpoints.whole import COEFFICIENTS, RECIPE
from trainmerge.coefficients.coefficients import Coefficients, load_coefficients
from trainmerge.inspection.attention import attention_findings
from trainmerge.inspection.console import (
    print_coefficients,
    print_findings,
    print_geometry,
    print_parameters,
    print_sources,
    print_suggestion,
)
from trainmerge.inspection.fence import attempt, fenced
from trainmerge.inspection.findings import Finding, expert_findings, read_texts, unchanged_tensors
from trainmerge.inspection.inspected import Inspected
from trainmerge.inspection.permuted import permuted_experts, permuted_findings, suggested_alignment
from trainmerge.inspection.sparse import is_sparse, sparse_findings
from trainmerge.inspection.suggest import Suggestion, check_new, suggest, write_suggestion
from trainmerge.inspection.suggested_start import is_low_rank
from trainmerge.inspection.weights import preprocess_findings, weight_findings
from trainmerge.preprocess import Informed
from trainmerge.run.folder import RunFolder
from trainmerge.run.heads import task_heads
from trainmerge.run.open_run import read_run
from trainmerge.run.opened import Opened
from trainmerge.run.recipe import Recipe
from trainmerge.run.sources import columns_of, initial_of, learns, recipe_of
from trainmerge.system.access import check_file_place
from trainmerge.system.atomic import write_whole
from trainmerge.system.hub import cached_folder
from trainmerge.task_vectors.geometry import Geometry, measure_geometry

CHEAP = 2 << 30  # bytes of weights that `auto` reads

Weights = Literal["auto", "yes", "no"]
WITHOUT_SOURCES = [
    Finding(
        "note",
        "an export names base and experts without their folders, so only its coefficients are shown",
        "inspect the run that it was exported from",
    )
]


def inspect_path(
    path: Path,
    every: bool = False,
    weights: Weights = "auto",
    suggestion: Path | None = None,
    output: Path | None = None,
    fit: Callable[[], Iterable[Finding]] = tuple,
) -> list[Finding]:
    """Print what a configuration, run or exported checkpoint merges, and possible problems.

    Args:
        path: A configuration, a run folder, or an exported checkpoint.
        every: List every parameter.
        weights: Whether to read the weights too; `auto` reads up to 2 GiB.
        suggestion: Where to write a suggested configuration.
        output: Where to write the results as JSON.
        fit: What a fit of the configuration finds before its first step; called if there is no error so far.

    Raises:
        ValueError: base and experts do not match; lists every mismatch.
        FileExistsError: `suggestion` already exists.
    """
    for file in filter(None, (suggestion, output)):
        check_file_place(file)  # before the work
    recipe = recipe_of(path)
    if suggestion is not None:
        check_new(suggestion)
    coefficients = _coefficients(path)
    if coefficients is not None and (path / RECIPE).is_file() and not _on_disk(recipe):
        print_coefficients(coefficients)
        print_findings(WITHOUT_SOURCES)
        return WITHOUT_SOURCES
    with TemporaryDirectory() as place:
        workspace = RunFolder(path).workspace if RunFolder(path).manifest.is_file() else Path(place)
        found = _look(path, recipe, workspace, weights, every)
        if path.is_file() and not any(finding.level == "error" for finding in found.findings):
            known = {finding.what for finding in found.findings}
            more = [finding for finding in fenced("the fit", fit) if finding.what not in known]
            found = found._replace(findings=[*found.findings, *more])
        print_findings(found.findings)
        if coefficients is not None:
            print_coefficients(coefficients)
        if found.suggested is not None and (suggestion is not None or path.is_file()):
            _show_suggestion(found.suggested, suggestion)
        if output is not None:
            write_whole(output, json.dumps(found.as_json(recipe), indent=1))
    return found.findings


def _on_disk(recipe: Recipe) -> bool:
    """Whether base and experts are here, as folders or in the hub's cache; nothing is downloaded."""
    return all(cached_folder(path) is not None for path in recipe.paths.values())


def _show_suggestion(suggested: Suggestion, file: Path | None) -> None:
    """Print a suggested configuration, and write it to `file` if there is one."""
    print_suggestion(suggested)
    if file is not None:
        write_suggestion(suggested, file)


def _coefficients(path: Path) -> Coefficients | None:
    """The coefficients of a run folder or an export; None for others."""
    run, exported = RunFolder(path), path / COEFFICIENTS
    if run.manifest.is_file() and run.coefficients.is_file():
        return read_run(run)[1]
    return load_coefficients(exported) if exported.is_file() else None


def _look(path: Path, recipe: Recipe, workspace: Path, weights: Weights, every: bool) -> Inspected:
    """Check a recipe, and print its tables; adapters that peft merges are merged in `workspace`."""
    with warnings.catch_warnings(record=True) as words:
        warnings.simplefilter("always")
        opened = recipe.open(workspace)
    findings = [Finding("warning", str(word.message)) for word in words]
    print_sources(recipe, opened)
    print_parameters(opened, every)
    findings += fenced("the tensors", lambda: unchanged_tensors(opened))
    findings += fenced("the experts' own tensors and templates", lambda: expert_findings(recipe, opened))
    informed = any(isinstance(method, Informed) for method in recipe.preprocess)
    columns = columns_of(path)
    chosen = None if opened.base.origin is None else str(opened.base.path)
    texts = read_texts(recipe, columns, informed or learns(path), chosen)
    findings += texts.findings
    geometry, measured = _measured(opened, weights)
    findings += measured
    lined_up: list[Align] = list(recipe.align)
    if geometry is not None and not recipe.align:
        known = geometry
        far, failed = attempt("permuted experts", lambda: permuted_experts(opened, known))
        findings += [*failed, *permuted_findings(far or {})]
        lined_up = suggested_alignment(far or {}, findings)
    findings += fenced("preprocessing", lambda: preprocess_findings(recipe, opened, geometry))
    if geometry is not None:
        print_geometry(opened.task_vectors.experts, geometry)
    sparse = geometry is not None and is_sparse(geometry, opened.task_vectors.shapes)
    heads = task_heads(recipe, opened)
    given = replace(recipe, align=lined_up), texts.counts, geometry, heads, columns
    suggested, failed = attempt(
        "a suggestion", lambda: suggest(*given, sparse, is_low_rank(opened), initial_of(path))
    )
    return Inspected(opened, texts, findings + failed, geometry, suggested)


def _measured(opened: Opened, weights: Weights) -> tuple[Geometry | None, list[Finding]]:
    """The task vectors' geometry and the findings from it; neither, if the weights are not read."""
    needed = weight_bytes(opened)
    if weights == "no" or (weights == "auto" and needed > CHEAP):
        what = f"{needed / 2**30:.1f} GiB of weights were not read, so they were not checked"
        return None, [Finding("note", what, "--weights yes reads them")]
    geometry, findings = attempt("the task vectors", lambda: measure_geometry(opened.task_vectors))
    if geometry is not None:
        known, experts = geometry, opened.task_vectors.experts
        findings += fenced("norms and cosines", lambda: weight_findings(experts, known))
        shapes = opened.task_vectors.shapes
        findings += fenced("sparse experts", lambda: sparse_findings(experts, known, shapes))
    findings += fenced("attention", lambda: attention_findings(opened.base, opened.task_vectors))
    return geometry, findings


def weight_bytes(opened: Opened) -> int:
    """Bytes of base and experts that one pass over the task vectors reads."""
    return sum(delta.nbytes for delta in opened.task_vectors.deltas.values())
