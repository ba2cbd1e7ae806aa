"""How a fit holds its model, and what is refused before it is made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from trainmerge.coefficients.initial import Initial
from trainmerge.coefficients.presets import MeasuredPreset
from trainmerge.data.calibration import Calibration
from trainmerge.model.teachers import BUDGET
from trainmerge.preprocess import Informed
from trainmerge.run.recipe import Opened, Recipe
from trainmerge.task_vectors.quantise import Quantise


@dataclass(frozen=True)
class ModelSettings:
    """How a fit's model is held in memory, and where its files are; `MergeModule` explains each of them."""

    weights: Literal["stored", "bfloat16"] = "stored"
    subspace: int = 0
    quantise: Quantise | None = None
    teacher_budget: int = BUDGET
    workspace: Path = Path("workspace")
    sharded: bool = False

    def __post_init__(self) -> None:
        if self.subspace < 0:
            raise ValueError(f"subspace must be 0 or more, not {self.subspace}")

    @property
    def dtype(self) -> torch.dtype | None:
        """The parameters' dtype; None is as stored."""
        return None if self.weights == "stored" else torch.bfloat16


def needs_examples(recipe: Recipe, initial: Initial) -> bool:
    """Whether merging as it starts needs calibration examples already."""
    informed = any(isinstance(method, Informed) for method in recipe.preprocess)
    return informed or isinstance(initial, MeasuredPreset)


def check_sharding(settings: ModelSettings, needs_examples: bool) -> None:
    """Raise ValueError if a model that is sharded would have to be measured whole."""
    if settings.sharded and (settings.subspace or needs_examples):
        raise ValueError(
            "model.sharded: preprocessors and presets that look at examples, and model.subspace, need "
            "the whole model on one device; leave them out, or run without it"
        )


def check_data(recipe: Recipe, opened: Opened, data: Calibration) -> None:
    """Raise ValueError if the data are of other experts or in another order, or longer than the model."""
    if absent := [name for name in recipe.experts if name not in data.files]:
        raise ValueError(
            f"recipe.experts: {absent} have no `calibration` file of unlabeled examples to learn from"
        )
    if list(data.files) != list(recipe.experts):
        raise ValueError(f"data are of {list(data.files)}, the experts are {list(recipe.experts)}")
    config = opened.base.config
    limit = (config.get("text_config") or config).get("max_position_embeddings")
    for name, examples in zip(data.files, data.examples, strict=True):
        if limit and (longest := data.tokenize.longest(examples, limit)) > limit:
            raise ValueError(
                f"{data.files[name]}: an example of {longest} tokens is over the model's limit of "
                f"{limit} (max_position_embeddings): set data.max_length to {limit} or less"
            )
