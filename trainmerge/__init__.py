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
    from trainmerge.evaluate import compare, evaluate_checkpoint, evaluate_run
    from trainmerge.examples import Columns
    from trainmerge.export import export_merge, export_run
    from trainmerge.frank_wolfe import FrankWolfe
    from trainmerge.functional import merged_weights
    from trainmerge.heads import LabelHead, LinearHead
    from trainmerge.inspection import inspect_path
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
    from trainmerge.recipe import Expert, HeldOut, Recipe
    from trainmerge.report import write_report
    from trainmerge.run import fit
    from trainmerge.stopping import StopWhenFlat
    from trainmerge.task_vectors import TaskVectors
    from trainmerge.tradeoffs import export_point, pareto_run, search_config
    from trainmerge.trainer import make_trainer
    from trainmerge.verify import verify_export

_HOMES = {
    "trainmerge.anchor": ["Anchor"],
    "trainmerge.calibration": ["Calibration"],
    "trainmerge.coefficients": ["Coefficients", "Grouping", "Layout", "load_coefficients"],
    "trainmerge.constraints": ["Box", "Free", "Sigmoid", "Simplex"],
    "trainmerge.evaluate": ["compare", "evaluate_checkpoint", "evaluate_run"],
    "trainmerge.export": ["export_merge", "export_run"],
    "trainmerge.examples": ["Columns"],
    "trainmerge.frank_wolfe": ["FrankWolfe"],
    "trainmerge.functional": ["merged_weights"],
    "trainmerge.heads": ["LabelHead", "LinearHead"],
    "trainmerge.inspection": ["inspect_path"],
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
    "trainmerge.recipe": ["Expert", "HeldOut", "Recipe"],
    "trainmerge.report": ["write_report"],
    "trainmerge.run": ["fit"],
    "trainmerge.stopping": ["StopWhenFlat"],
    "trainmerge.task_vectors": ["TaskVectors"],
    "trainmerge.trainer": ["make_trainer"],
    "trainmerge.tradeoffs": ["export_point", "pareto_run", "search_config"],
    "trainmerge.verify": ["verify_export"],
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
