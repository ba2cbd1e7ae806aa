"""trainmerge: learned-coefficient model merging.

The public names, imported when first used, so that `import trainmerge` and `trainmerge --help` are quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainmerge.coefficients.anchor import Anchor
    from trainmerge.coefficients.coefficients import Coefficients, load_coefficients
    from trainmerge.coefficients.constraints import Box, Free, Sigmoid, Simplex
    from trainmerge.coefficients.frank_wolfe import FrankWolfe
    from trainmerge.coefficients.layout import Grouping, Layout
    from trainmerge.coefficients.presets import T3, DomainPosterior, LayerSwap, MetricsWeighted, Preset
    from trainmerge.data.calibration import Calibration
    from trainmerge.data.examples import Columns
    from trainmerge.data.heads import LabelHead, LinearHead
    from trainmerge.evaluate import compare, evaluate_checkpoint, evaluate_run
    from trainmerge.export.export import export_merge, export_run
    from trainmerge.export.verify import verify_export
    from trainmerge.fitting.early_stopping import StopWhenFlat
    from trainmerge.fitting.fit import fit
    from trainmerge.fitting.module import MergeModule
    from trainmerge.fitting.plan_fit import plan_fit
    from trainmerge.fitting.trainer import make_trainer
    from trainmerge.inspection import inspect_path
    from trainmerge.model.functional import merged_weights
    from trainmerge.model.merged_model import MergedModel
    from trainmerge.objectives import Alignment, Entropy, Objective
    from trainmerge.plan.plan import Plan
    from trainmerge.plan.plan_model import plan_model
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
    from trainmerge.report import write_report
    from trainmerge.run.recipe import Expert, HeldOut, Recipe
    from trainmerge.task_vectors.delta import TaskVectors
    from trainmerge.task_vectors.quantise import Int8, Ternary
    from trainmerge.tradeoffs import export_point, pareto_run, search_config

_HOMES = {
    "trainmerge.coefficients.anchor": ["Anchor"],
    "trainmerge.coefficients.coefficients": ["Coefficients", "load_coefficients"],
    "trainmerge.coefficients.constraints": ["Box", "Free", "Sigmoid", "Simplex"],
    "trainmerge.coefficients.frank_wolfe": ["FrankWolfe"],
    "trainmerge.coefficients.layout": ["Grouping", "Layout"],
    "trainmerge.coefficients.presets": ["T3", "DomainPosterior", "LayerSwap", "MetricsWeighted", "Preset"],
    "trainmerge.data.calibration": ["Calibration"],
    "trainmerge.data.examples": ["Columns"],
    "trainmerge.data.heads": ["LabelHead", "LinearHead"],
    "trainmerge.evaluate": ["compare", "evaluate_checkpoint", "evaluate_run"],
    "trainmerge.export.export": ["export_merge", "export_run"],
    "trainmerge.export.verify": ["verify_export"],
    "trainmerge.fitting.early_stopping": ["StopWhenFlat"],
    "trainmerge.fitting.fit": ["fit"],
    "trainmerge.fitting.module": ["MergeModule"],
    "trainmerge.fitting.plan_fit": ["plan_fit"],
    "trainmerge.fitting.trainer": ["make_trainer"],
    "trainmerge.inspection": ["inspect_path"],
    "trainmerge.model.functional": ["merged_weights"],
    "trainmerge.model.merged_model": ["MergedModel"],
    "trainmerge.objectives": ["Alignment", "Entropy", "Objective"],
    "trainmerge.plan.plan": ["Plan"],
    "trainmerge.plan.plan_model": ["plan_model"],
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
    "trainmerge.report": ["write_report"],
    "trainmerge.run.recipe": ["Expert", "HeldOut", "Recipe"],
    "trainmerge.task_vectors.delta": ["TaskVectors"],
    "trainmerge.task_vectors.quantise": ["Int8", "Ternary"],
    "trainmerge.tradeoffs": ["export_point", "pareto_run", "search_config"],
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
    "FrankWolfe",
    "Free",
    "Grouping",
    "HeldOut",
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
    "StopWhenFlat",
    "TaskVectors",
    "Ternary",
    "Ties",
    "Tsv",
    "Widen",
    "Wudi",
    "compare",
    "evaluate_checkpoint",
    "evaluate_run",
    "export_merge",
    "export_point",
    "export_run",
    "fit",
    "inspect_path",
    "load_coefficients",
    "make_trainer",
    "merged_weights",
    "pareto_run",
    "plan_fit",
    "plan_model",
    "search_config",
    "verify_export",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trainmerge' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
