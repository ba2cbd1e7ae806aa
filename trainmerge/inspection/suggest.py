"""A suggested configuration by rules of thumb, each with its reason.

The rules follow published recipes and this project's benchmark suites; they guarantee nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from trainmerge.checkpoints import OwnHead, read_modules
from trainmerge.coefficients.layout import Granularity
from trainmerge.data.columns import Columns
from trainmerge.data.held_out import LEAST
from trainmerge.inspection.suggested_start import Beginning, beginning, closed_form
from trainmerge.run.config import to_config
from trainmerge.run.heads import TaskHead, task_heads
from trainmerge.run.recipe import Recipe
from trainmerge.system.atomic import write_whole
from trainmerge.task_vectors.geometry import Geometry

ENOUGH = 4  # examples per expert, for one coefficient per tensor
MOST = 256  # examples per expert
SHARE = 0.2  # of each expert's examples, held out to stop by
STOP = "keeps the step that recovers most of the experts on held-out examples, and stops after it"


@dataclass(frozen=True)
class Suggestion:
    """Sections of a configuration, with reasons."""

    settings: Mapping[str, Any]
    reasons: Mapping[str, str]  # key -> why


def suggest(
    recipe: Recipe,
    examples: Mapping[str, int],
    geometry: Geometry | None,
    found: Mapping[str, TaskHead] | None = None,
    columns: Columns = Columns(),  # noqa: B008 - frozen
    sparse: bool = False,
    low_rank: bool = False,
    initial: Any = None,
) -> Suggestion:
    """Objective, grouping, start and steps for a recipe; a closed form without calibration examples.

    `examples` is the number per expert, read by `columns`; `geometry` of the task vectors, if measured,
    refines the start; `found` are the experts' heads, by default those of `task_heads`. `sparse` task vectors
    are those of `sparse.is_sparse`, `low_rank` ones those of adapters. `initial` is the configuration's own.
    """
    K, found = len(recipe.experts), task_heads(recipe) if found is None else found
    own = [name for name, head in found.items() if isinstance(head, OwnHead)]
    experts = {n: replace(e, head="own") if n in own else e for n, e in recipe.experts.items()}
    recipe = replace(recipe, experts=experts)
    if len(examples) < K or not all(examples.values()):
        return _closed(recipe, closed_form(sparse, low_rank))
    begin = beginning(recipe, geometry, sparse, low_rank, initial)
    objective, reason, steps, batch_size = _objective(recipe, found)
    fewest = min(MOST, *examples.values())
    held = max(LEAST, round(SHARE * fewest)) if fewest >= 2 * LEAST else 0
    granularity: Granularity = "tensor" if fewest >= ENOUGH else "block"
    enough = "enough for one coefficient per tensor" if fewest >= ENOUGH else "few, so fewer coefficients"
    reasons = {
        "recipe.grouping.granularity": f"{fewest} examples per expert are {enough}",
        **_of_alignment(recipe),
        **{f"recipe.experts.{name}.head": "the head in its files is its own: not merged" for name in own},
        "model.objective": reason,
        **begin.reasons,
        "trainer.max_steps": f"{steps} steps of Adam at 0.05 were enough in this project's suites",
        **({"trainer.callbacks": STOP} if held else {}),
    }
    grouping = to_config(replace(recipe.grouping, granularity=granularity, chunks=1))
    settings = {
        "recipe": {**to_config(replace(recipe, preprocess=begin.preprocess)), "grouping": grouping},
        "model": {
            "objective": objective,
            "initial": begin.initial,
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.05}},
        },
        "data": {
            "batch_size": min(batch_size, fewest - held),
            "max_examples": MOST,
            "max_length": 256,
            **({"held_out": SHARE} if held else {}),
            **({} if columns == Columns() else {"columns": columns.record()}),
        },
        "trainer": {
            "max_steps": steps,
            **({"callbacks": [{"class_path": "trainmerge.StopOnHeldOut"}]} if held else {}),
        },
    }
    return Suggestion(settings, reasons)


def _objective(recipe: Recipe, found: Mapping[str, TaskHead]) -> tuple[dict[str, Any], str, int, int]:
    """Objective, reason, steps and batch size, by what the experts `found` heads and the base give."""
    heads = all(found.values())
    if heads and all(not isinstance(head, OwnHead) or head.outputs == "classes" for head in found.values()):
        reason = "classifiers: minimise entropy, with agreement with each expert against collapse"
        return {"class_path": "trainmerge.Entropy", "init_args": {"agreement": 5.0}}, reason, 80, 4
    if not any(found.values()) and read_modules(recipe.folders["base"]):
        reason = "sentence embedders (modules.json): match each expert's similarities on its own texts"
        return {"class_path": "trainmerge.Similarity"}, reason, 60, 16
    alignment = {"class_path": "trainmerge.Alignment", "init_args": {"logits": 1.0}}
    reason = "match each expert's outputs on its own examples (Expert Merging)"
    if heads:
        return alignment, reason, 80, 4
    return alignment, f"no heads: {reason}", 40, 1


def _closed(recipe: Recipe, begin: Beginning) -> Suggestion:
    """A closed form: no training, no data."""
    settings = {
        "recipe": to_config(replace(recipe, preprocess=begin.preprocess)),
        "model": {"initial": begin.initial},
        "trainer": {"max_steps": 0},
    }
    reasons = {**begin.reasons, "trainer.max_steps": "nothing is learned", **_of_alignment(recipe)}
    return Suggestion(settings, reasons)


def _of_alignment(recipe: Recipe) -> dict[str, str]:
    reason = "an expert is permuted or locked: its weights are not in the base's places"
    return {"recipe.align": reason} if recipe.align else {}


def check_new(path: Path) -> None:
    """Raise FileExistsError if the file already exists."""
    if path.exists():
        raise FileExistsError(f"{path} already exists: choose another file, or remove it")


def write_suggestion(suggestion: Suggestion, path: Path) -> None:
    """A configuration for `trainmerge fit`, with the reasons as comments on top. Raises as `check_new`."""
    check_new(path)
    lines = ["# Suggested by `trainmerge inspect` from rules of thumb: a starting point."]
    if suggestion.settings["trainer"]["max_steps"]:
        lines.append("# `trainmerge auto THIS_FILE OUT` tries other starts and methods on held-out examples.")
    lines += [f"# {key}: {reason}" for key, reason in suggestion.reasons.items()]
    text = yaml.safe_dump(dict(suggestion.settings), sort_keys=False, width=110)
    write_whole(path, "\n".join(lines) + "\n" + text)
