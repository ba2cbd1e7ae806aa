"""A finished run -> its module and data, at the final coefficients."""

from dataclasses import replace

from trainmerge.coefficients.layout import Grouping
from trainmerge.data.calibration import Calibration
from trainmerge.fitting.module import MergeModule
from trainmerge.objectives import Objective
from trainmerge.run.config import build
from trainmerge.run.folder import RunFolder
from trainmerge.run.manifest import read_manifest
from trainmerge.run.open_run import open_run
from trainmerge.run.run_data import run_data

SETTINGS = {"objective": dict, "teacher_budget": int, "weights": str}  # of the module, in the manifest


def reopen(
    folder: RunFolder, grouping: Grouping | None = None, examples: int | None = None
) -> tuple[MergeModule, Calibration]:
    """Module and data of a run; the model is not loaded yet, and no coefficient is fixed.

    `grouping` replaces the run's by a finer one. `examples`: use the first so many per expert; by default
    all.

    Raises:
        ValueError: no run, no coefficients, a manifest without its settings, or base or experts changed
            since the fit.
    """
    recipe, _, _ = open_run(folder)
    manifest = read_manifest(folder.manifest, SETTINGS)
    module = MergeModule(
        replace(recipe, grouping=grouping or recipe.grouping),
        build(Objective, manifest["objective"], folder.manifest),  # type: ignore[type-abstract]
        initial=str(folder.coefficients),
        teacher_budget=manifest["teacher_budget"],
        weights=manifest["weights"],
        workspace=str(folder.workspace),
    )
    module.coefficients.release_()  # trade-offs scale fixed coefficients too, and need their gradients
    return module, run_data(folder, recipe, examples)
