"""trainmerge: learned-coefficient model merging.

The public names, imported when first used, so that `import trainmerge` and `trainmerge --help` are quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainmerge.anchor import Anchor
    from trainmerge.calibration import Calibration
    from trainmerge.coefficients import Coefficients, Grouping, Layout, load_coefficients
    from trainmerge.constraints import Box, Free, Sigmoid, Simplex
    from trainmerge.evaluate import evaluate_run
    from trainmerge.examples import Columns
    from trainmerge.export import export_merge, export_run
    from trainmerge.functional import merged_weights
    from trainmerge.heads import LabelHead, LinearHead
    from trainmerge.merged_model import MergedModel
    from trainmerge.module import MergeModule
    from trainmerge.objectives import Alignment, Entropy, Objective
    from trainmerge.plan import Plan
    from trainmerge.planning import plan_fit, plan_model
    from trainmerge.preprocess import (
        Breadcrumbs,
        Consensus,
        Dare,
        Doge,
        Fisher,
        ModelStock,
        Opcm,
        OptMerge,
        Pcb,
        Preprocess,
        Rcp,
        RegMean,
        Slerp,
        Ties,
        Tsv,
        Widen,
        Wudi,
    )
    from trainmerge.presets import T3, DomainPosterior, LayerSwap, MetricsWeighted, Preset
    from trainmerge.quantise import Int8, Ternary
    from trainmerge.recipe import Expert, Recipe
    from trainmerge.run import fit, make_trainer
    from trainmerge.task_vectors import TaskVectors

_HOMES = {
    "trainmerge.anchor": ["Anchor"],
    "trainmerge.calibration": ["Calibration"],
    "trainmerge.coefficients": ["Coefficients", "Grouping", "Layout", "load_coefficients"],
    "trainmerge.constraints": ["Box", "Free", "Sigmoid", "Simplex"],
    "trainmerge.evaluate": ["evaluate_run"],
    "trainmerge.export": ["export_merge", "export_run"],
    "trainmerge.examples": ["Columns"],
    "trainmerge.functional": ["merged_weights"],
    "trainmerge.heads": ["LabelHead", "LinearHead"],
    "trainmerge.merged_model": ["MergedModel"],
    "trainmerge.module": ["MergeModule"],
    "trainmerge.objectives": ["Alignment", "Entropy", "Objective"],
    "trainmerge.plan": ["Plan"],
    "trainmerge.planning": ["plan_fit", "plan_model"],
    "trainmerge.preprocess": [
        "Breadcrumbs",
        "Consensus",
        "Dare",
        "Doge",
        "Fisher",
        "ModelStock",
        "Opcm",
        "OptMerge",
        "Pcb",
        "Preprocess",
        "Rcp",
        "RegMean",
        "Slerp",
        "Ties",
        "Tsv",
        "Widen",
        "Wudi",
    ],
    "trainmerge.presets": ["T3", "DomainPosterior", "LayerSwap", "MetricsWeighted", "Preset"],
    "trainmerge.quantise": ["Int8", "Ternary"],
    "trainmerge.recipe": ["Expert", "Recipe"],
    "trainmerge.run": ["fit", "make_trainer"],
    "trainmerge.task_vectors": ["TaskVectors"],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "T3",
    "Alignment",
    "Anchor",
    "Box",
    "Breadcrumbs",
    "Calibration",
    "Coefficients",
    "Columns",
    "Consensus",
    "Dare",
    "Doge",
    "DomainPosterior",
    "Entropy",
    "Expert",
    "Fisher",
    "Free",
    "Grouping",
    "Int8",
    "LabelHead",
    "LayerSwap",
    "Layout",
    "LinearHead",
    "MergeModule",
    "MergedModel",
    "MetricsWeighted",
    "ModelStock",
    "Objective",
    "Opcm",
    "OptMerge",
    "Pcb",
    "Plan",
    "Preprocess",
    "Preset",
    "Rcp",
    "Recipe",
    "RegMean",
    "Sigmoid",
    "Simplex",
    "Slerp",
    "TaskVectors",
    "Ternary",
    "Ties",
    "Tsv",
    "Widen",
    "Wudi",
    "evaluate_run",
    "export_merge",
    "export_run",
    "fit",
    "load_coefficients",
    "make_trainer",
    "merged_weights",
    "plan_fit",
    "plan_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trainmerge' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
