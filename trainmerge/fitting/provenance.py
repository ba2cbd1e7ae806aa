"""Everything that a run depends on, and a check of its checkpoints."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from trainmerge.coefficients.presets import Preset
from trainmerge.data.calibration import Calibration
from trainmerge.fitting.module import MergeModule
from trainmerge.fitting.optimisation import build_optimisation
from trainmerge.run.config import to_config
from trainmerge.run.heads import task_heads
from trainmerge.system.json_file import parse_json
from trainmerge.system.torch_file import load_torch


def describe(module: MergeModule, data: Calibration) -> dict[str, Any]:
    """Everything that a run's coefficients depend on, as JSON data; it must be equal on resuming."""
    recipe, coefficients = module.recipe, module.coefficients
    return {
        "experts": list(recipe.experts),  # in order, which equality of mappings ignores
        "checksums": module.opened.checksums,
        "heads": {
            name: h.identity() for name, h in task_heads(recipe, module.opened).items() if h is not None
        },
        "calibration": data.identities(),
        "data": data.settings(),
        "recipe": to_config(replace(recipe, held_out={})),  # scored, never learned from
        "objective": to_config(module.objective),
        "constraint": to_config(coefficients.constraint),
        "anchor": to_config(module.anchor),
        "clip": module.clip,
        "combine": repr(module.rule),
        "layout": module.opened.layout.identity(),
        "weights": module.settings.weights,
        "subspace": module.settings.subspace,
        "teacher_budget": module.settings.teacher_budget,
        **({"quantise": to_config(module.settings.quantise)} if module.settings.quantise else {}),
        **({"on_policy": to_config(module.on_policy)} if module.on_policy else {}),
        **({"initial": to_config(module.initial)} if isinstance(module.initial, Preset) else {}),
        "start": hashlib.sha256(module.start.numpy().tobytes()).hexdigest(),
        **_optimisation(module),
    }


def _optimisation(module: MergeModule) -> dict[str, str]:
    _, optimizer, scheduler = build_optimisation(module)
    settings = {"optimizer": optimizer}
    if scheduler is not None:
        state = {key: str(value) for key, value in sorted(scheduler.state_dict().items())}
        settings["lr_scheduler"] = f"{type(scheduler).__name__} {state}"
    return settings


def load_snapshot(path: Path) -> dict[str, Any]:
    """A fit's checkpoint.

    Raises:
        ValueError: the file is damaged, or not a fit's checkpoint.
    """
    try:
        snapshot: dict[str, Any] = load_torch(path)
        step, raw = snapshot["global_step"], snapshot["state_dict"]["coefficients.raw"]
        made = parse_json(snapshot["trainmerge"], "its description", "")
        if not (isinstance(step, int) and isinstance(raw, Tensor) and isinstance(made, dict)):
            raise ValueError("it lacks the step, the coefficients or the run's description")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = error if isinstance(error, ValueError) else type(error).__name__
        raise ValueError(
            f"{path}: not a checkpoint of a fit, or damaged ({reason}). Resume from another one, or remove "
            "it to start anew"
        ) from error
    return snapshot
