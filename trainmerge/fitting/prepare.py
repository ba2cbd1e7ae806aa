"""Makes a fit's model whole, in one walk.

    task vectors -> base and heads -> what looks at examples -> quantise -> subspaces -> merged model -> start
    -> teachers

Each step is one function; `prepare` calls them in order. Results that depend on files alone are kept in the
workspace, and found again.

Legend: `K` experts, `G` coefficient groups, `m` rows of a matrix, `k` directions.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.presets import MeasuredPreset, Preset
from trainmerge.data.batch import Asks
from trainmerge.data.calibration import Calibration
from trainmerge.model.activation_checkpointing import recompute_blocks
from trainmerge.model.expert_statistics import ExpertStatistics
from trainmerge.model.resident import Placement, Resident, load_resident, preprocess
from trainmerge.model.teachers import BUDGET, Record, record_teachers
from trainmerge.plan.micro_batches import StepSchedule
from trainmerge.preprocess import Informed, Preprocess, apply, key_after
from trainmerge.preprocess.subspace import shared_subspaces
from trainmerge.run.recipe import Opened, Recipe
from trainmerge.system import distributed
from trainmerge.task_vectors.delta import TaskVectors
from trainmerge.task_vectors.quantise import Quantise, quantised

Initial = float | Sequence[float] | str | Preset


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


@dataclass(frozen=True)
class Ingredients:
    """What a fit's model is made from."""

    recipe: Recipe
    opened: Opened
    coefficients: Coefficients
    initial: Initial
    asks: Asks  # what the objective needs of the experts
    data: Calibration
    settings: ModelSettings
    schedule: StepSchedule

    def identity(self) -> str:
        """What the preprocessed task vectors depend on."""
        return repr([self.opened.identity(), self.recipe.preprocess, self.data.identity()])


@dataclass(frozen=True)
class Prepared:
    """A fit's model, ready for its first step."""

    resident: Resident
    start: Tensor | None  # what a preset measured, of a shape that expands to [K, G]; None if there is none
    teachers: list[Record]  # K; none where the objective needs nothing of the experts


def prepare(
    given: Ingredients,
    device: torch.device | str,
    precision: Callable[[], AbstractContextManager[Any]],
) -> Prepared:
    """The walk from mapped files to a model in memory; no merge is written yet.

    Experts are recorded in the fit's own `precision`, where each then agrees with itself.
    """
    recipe, settings, schedule = given.recipe, given.settings, given.schedule
    given.opened.share_checksums()
    first, rest = split_at_examples(recipe.preprocess)
    vectors = preprocess(given.opened, first, settings.workspace)  # in the memory that the model will need
    placement = Placement(device, settings.dtype, settings.sharded)
    experts = load_resident(recipe, given.opened, given.coefficients, given.data.tokenize, placement)
    vectors = look_at_examples(given, vectors, first, rest, experts)
    vectors = make_smaller(given, vectors)
    resident = experts.merging(vectors, find_subspaces(given, vectors), schedule.keep)
    if schedule.recompute:
        recompute_blocks(resident.merged.module)
    start = measure_start(given, resident)
    with precision():
        teachers = record(given, resident)
    return Prepared(resident, start, teachers)


def split_at_examples(
    methods: Sequence[Preprocess],
) -> tuple[Sequence[Preprocess], Sequence[Preprocess]]:
    """The methods before the first that looks at examples, and the rest."""
    first = list(takewhile(lambda method: not isinstance(method, Informed), methods))
    return first, methods[len(first) :]


def look_at_examples(
    given: Ingredients,
    vectors: TaskVectors,
    first: Sequence[Preprocess],
    rest: Sequence[Preprocess],
    experts: Resident,
) -> TaskVectors:
    """The task vectors after the `rest` of the methods, for which the experts run on their examples."""
    if not rest:
        return vectors
    statistics = statistics_of(given, experts)
    with distributed.rank_zero_first():
        inputs = key_after(first, given.opened.identity())
        return apply(vectors, rest, given.settings.workspace, inputs, given.data.identity(), statistics)


def statistics_of(given: Ingredients, resident: Resident) -> ExpertStatistics:
    """The experts on their own calibration examples."""
    return ExpertStatistics(resident, given.data.examples, given.data.tokenize, given.settings.workspace)


def make_smaller(given: Ingredients, vectors: TaskVectors) -> TaskVectors:
    """The task vectors that are learned on: quantised ones, if the settings say so."""
    if given.settings.quantise is None:
        return vectors
    with distributed.rank_zero_first():
        return quantised(vectors, given.settings.quantise, given.settings.workspace, given.identity())


def find_subspaces(given: Ingredients, vectors: TaskVectors) -> Mapping[str, Tensor]:
    """The experts' shared subspace [m, k] of each matrix, which its gradient leaves out."""
    if not given.settings.subspace:
        return {}
    return shared_subspaces(vectors, given.settings.subspace, given.settings.workspace, given.identity())


def measure_start(given: Ingredients, resident: Resident) -> Tensor | None:
    """Where a preset that measures the experts has the coefficients start."""
    if not isinstance(given.initial, MeasuredPreset):
        return None
    return given.initial.measured(tuple(given.recipe.experts), statistics_of(given, resident))


def record(given: Ingredients, resident: Resident) -> list[Record]:
    """The experts' outputs on their own examples, if the objective needs them."""
    if given.asks == Asks():
        return []
    data, settings = given.data, given.settings
    heads = [expert.head.identity() if expert.head else "" for expert in given.recipe.experts.values()]
    depends_on = [
        given.opened.identity(),
        *heads,
        *data.identities().values(),
        data.tokenizer,
        data.max_length,
        settings.weights,
        torch.is_autocast_enabled(resident.device.type),
    ]
    folder, budget = settings.workspace, settings.teacher_budget
    return record_teachers(
        resident, data.examples, data.tokenize, given.asks, folder, repr(depends_on), budget
    )


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
