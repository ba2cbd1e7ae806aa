"""Settings of a fit's model, and their checks before it is loaded."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from trainmerge.checkpoints import output_of
from trainmerge.coefficients.coefficients import load_coefficients
from trainmerge.coefficients.initial import Initial
from trainmerge.coefficients.measured_presets import MeasuredPreset
from trainmerge.data.calibration import Calibration
from trainmerge.data.generate import generate_problems
from trainmerge.data.token_checks import check_lengths
from trainmerge.model.residency import Vectors
from trainmerge.model.teachers import BUDGET
from trainmerge.preprocess import Informed, Trim
from trainmerge.run.merge_buffers import REESTIMATE
from trainmerge.run.opened import Opened
from trainmerge.run.recipe import Recipe
from trainmerge.system.ranges import check_fields, check_option
from trainmerge.task_vectors.quantise import Quantise


@dataclass(frozen=True)
class ModelSettings:
    """How a fit's model is stored in memory, and where its files are; `MergeModule` documents each field."""

    weights: Literal["stored", "bfloat16"] = "stored"
    subspace: int = 0
    quantise: Quantise | None = None
    teacher_budget: int = BUDGET
    workspace: Path = Path("workspace")
    sharded: bool = False
    vectors: Vectors = "auto"
    shard_over: Literal["all", "machine"] = "all"
    gathered_ahead: int = 1

    def __post_init__(self) -> None:
        least = {"subspace": "[0, inf)", "teacher_budget": "[1, inf)", "gathered_ahead": "[0, inf)"}
        check_fields(self, "model", **least)

    def shards(self, processes: int, machine: int) -> int:
        """The processes that share one model, of so many, `machine` of them on this machine."""
        return 1 if not self.sharded else machine if self.shard_over == "machine" else processes

    @property
    def dtype(self) -> torch.dtype | None:
        """The parameters' dtype; None is the stored one."""
        return None if self.weights == "stored" else torch.bfloat16


def needs_examples(recipe: Recipe, initial: Initial) -> bool:
    """Whether starting coefficients, task vectors or batch norms' statistics need calibration examples."""
    informed = any(isinstance(method, Informed) for method in recipe.preprocess)
    return informed or isinstance(initial, MeasuredPreset) or recipe.buffers == REESTIMATE


def check_given(**settings: object) -> None:
    """Raise ValueError for keys of `model` that are null; a key that is left out has its default."""
    if absent := [f"model.{name}" for name, value in settings.items() if value is None]:
        raise ValueError(f"{', '.join(absent)}: null is no value; remove the key for its default, or set it")


def check_module_settings(
    settings: ModelSettings, recipe: Recipe, initial: Initial, clip: float, keep_better: bool
) -> None:
    """Raise ValueError for arguments of `MergeModule` out of range, or that a sharded model does not have.

    Also for those that only a sharded model has.
    """
    check_option("model.clip", clip, float, "[0, inf)")
    check_option("model.keep_better", keep_better, bool)
    of_shards = {"shard_over": "all", "gathered_ahead": 1}
    for name, default in of_shards.items():
        if (value := getattr(settings, name)) != default and not settings.sharded:
            raise ValueError(f"model.{name}: {value} is for model.sharded: set that to true, or leave it out")
    if settings.sharded and (settings.subspace or needs_examples(recipe, initial)):
        raise ValueError(
            "model.sharded: model.subspace, `buffers: reestimate` and preprocessors or presets that use "
            "calibration examples need the whole model on one device; leave them out, or run without "
            "model.sharded"
        )


def warn_of_densities(recipe: Recipe, initial: Initial) -> None:
    """Warn if a start's coefficients were found for trimmed experts, which the recipe does not trim."""
    found = load_coefficients(Path(initial)).densities if isinstance(initial, str) else ()
    if found and (not recipe.preprocess or recipe.preprocess[-1] != Trim(found)):
        warnings.warn(
            f"model.initial: {initial} has coefficients that a search found together with densities: for the "
            f"same merge, make trainmerge.Trim with density {list(found)} the last of recipe.preprocess",
            stacklevel=3,
        )


def check_data(recipe: Recipe, opened: Opened, data: Calibration, sharded: bool = False) -> None:
    """Raise ValueError if the data's experts or their order differ, or examples exceed the model's length.

    Also if a `sharded` model would have to write texts.
    """
    if absent := [name for name in recipe.experts if name not in data.files]:
        raise ValueError(
            f"recipe.experts: {absent} have no `calibration` file of unlabeled examples to learn from"
        )
    if data.unwritten:
        check_writers(opened, data, sharded)
    if list(data.files) != list(recipe.experts):
        raise ValueError(
            f"the data have the experts {list(data.files)}, the recipe has {list(recipe.experts)}"
        )
    folder = opened.base.path
    if opened.base.origin is not None and Path(data.tokenizer).resolve() != folder.resolve():
        raise ValueError(
            f"data.tokenizer is {data.tokenizer}, and the recipe chooses another for the merge: set it to "
            "recipe.tokenizer_folder(Path(module's workspace))"
        )
    output = output_of(opened.base.path)
    for name, examples in zip(data.files, data.examples, strict=True):
        if name in data.unwritten:  # no longer than the model reads
            continue
        try:
            check_lengths(data.tokenize, examples, output.positions, output.architecture, "data.max_length")
        except ValueError as error:
            raise ValueError(f"{data.files[name]}: {error}") from error


def check_writers(opened: Opened, data: Calibration, sharded: bool) -> None:
    """Raise ValueError if experts cannot write the texts that the data ask of them."""
    output = output_of(opened.base.path)
    problems = [*generate_problems(data.files, output.kind, output.architecture, data.columns)]
    if sharded:
        problems.append(
            f"model.sharded: {[*data.unwritten]} write their texts, which needs the whole model on one "
            "device: run without model.sharded, or give files of texts"
        )
    if problems:
        raise ValueError("\n".join(problems))
