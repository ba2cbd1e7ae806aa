"""What `trainmerge inspect` shows: a recipe before it runs, the coefficients after."""

from collections import Counter
from pathlib import Path

from trainmerge.coefficients import Coefficients, load_coefficients
from trainmerge.evaluate import recipe_of
from trainmerge.kernels import Difference, ExpertWeight, LowRank, Quantised, Untouched
from trainmerge.recipe import Opened, Recipe
from trainmerge.run_folder import RunFolder
from trainmerge.tables import print_table
from trainmerge.task_vectors import Delta

FORMS = {
    Difference: "given",
    ExpertWeight: "full",
    LowRank: "low-rank",
    Quantised: "quantised",
    Untouched: "none",
}


def inspect_path(path: Path, every: bool = False) -> None:
    """Print a recipe's parameters, and the coefficients where there are some."""
    recipe = recipe_of(path)
    opened = recipe.open(RunFolder(path).workspace if path.is_dir() else None)
    print_sources(recipe, opened)
    print_parameters(opened, every)
    for name in ("coefficients.safetensors", "trainmerge_coefficients.safetensors"):
        if (path / name).is_file():
            print_coefficients(load_coefficients(path / name))


def print_sources(recipe: Recipe, opened: Opened) -> None:
    """Base and experts: where they are and in what form their changes come."""
    rows = [["base", recipe.base, f"{len(opened.base.tensors)} tensors", ""]]
    for k, (name, expert) in enumerate(recipe.experts.items()):
        forms = Counter(FORMS[type(delta.terms[k])] for delta in opened.task_vectors.deltas.values())
        changes = ", ".join(f"{count} {form}" for form, count in forms.items())
        rows.append([name, expert.path, changes, expert.calibration or "no calibration data"])
    print_table("what is merged", ["name", "folder", "parameters changed", "calibration"], rows)


def print_parameters(opened: Opened, every: bool) -> None:
    """Parameters with their number of coefficients, or why they keep the base's value."""
    layout = opened.layout
    untouched = {
        name: "no expert changes it" for name in opened.base.tensors if name not in opened.task_vectors.deltas
    }
    kept = {**untouched, **layout.excluded}
    deltas = opened.task_vectors.deltas
    merged = sum(deltas[name].base.numel() for name in layout.groups)
    experts = len(opened.task_vectors.experts)
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
