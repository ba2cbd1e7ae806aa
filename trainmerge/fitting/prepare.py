"""Prepare a fit's model: one function per step, called in order by `prepare`.

    task vectors -> base and heads -> texts that experts write -> preprocessors that use examples -> quantise
    -> subspaces -> merged model -> start -> teachers -> batch norms' statistics

Results that depend only on files are cached in the workspace.

Legend: `K` experts, `G` coefficient groups, `m` rows of a matrix, `k` directions.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.initial import Initial
from trainmerge.coefficients.measured_presets import MeasuredPreset
from trainmerge.data.batch import Asks
from trainmerge.data.calibration import Calibration, recorded_tokenizer
from trainmerge.fitting.generated import write_generated
from trainmerge.fitting.model_settings import ModelSettings
from trainmerge.model.activation_checkpointing import recompute_blocks
from trainmerge.model.expert_statistics import ExpertStatistics
from trainmerge.model.residency import Residency, Room, Share, reside
from trainmerge.model.resident import Placement, Resident, load_resident, preprocess
from trainmerge.model.row_shards import delta_shards
from trainmerge.model.statistics import statistics_at
from trainmerge.model.teachers import Record, record_teachers
from trainmerge.plan.micro_batches import StepSchedule
from trainmerge.preprocess import Informed, Preprocess, apply, key_after
from trainmerge.preprocess.subspace import shared_subspaces
from trainmerge.run.heads import task_heads
from trainmerge.run.merge_buffers import REESTIMATE
from trainmerge.run.opened import Opened
from trainmerge.run.recipe import Recipe
from trainmerge.system import distributed
from trainmerge.task_vectors.delta import TaskVectors
from trainmerge.task_vectors.quantise import quantised


@dataclass(frozen=True)
class FitInputs:
    """The inputs of `prepare`."""

    recipe: Recipe
    opened: Opened
    coefficients: Coefficients
    initial: Initial
    asks: Asks  # the expert outputs that the objective needs
    data: Calibration
    settings: ModelSettings
    schedule: StepSchedule
    room: Room | None = None  # for task vectors on the device; None if it is unknown
    machine: int = 0  # processes on this machine; 0 is all

    def without_records(self) -> "FitInputs":
        """The same where nothing of the experts is recorded on the examples."""
        return replace(self, asks=Asks(embedding=self.asks.embedding))

    def identity(self) -> str:
        """A text that identifies the preprocessed task vectors."""
        return repr([self.opened.identity(), self.recipe.preprocess, self.data.identity()])


@dataclass(frozen=True)
class Prepared:
    """A fit's model, ready for its first step."""

    resident: Resident
    start: Tensor | None  # a preset's measured coefficients, expandable to [K, G]; None without one
    teachers: list[Record]  # K; empty if the objective needs no expert outputs


def prepare(
    given: FitInputs,
    device: torch.device | str,
    precision: Callable[[], AbstractContextManager[Any]],
) -> Prepared:
    """From mapped files to a model in memory; the merge is not materialised yet.

    Experts are recorded in the fit's own `precision`, so an expert has zero divergence from itself.
    """
    recipe, settings, schedule = given.recipe, given.settings, given.schedule
    given.opened.share_checksums()
    first, rest = split_at_examples(recipe.preprocess)
    vectors = preprocess(
        given.opened, first, settings.workspace
    )  # before the model is loaded, to reuse its memory
    world = distributed.world_size()
    shards = settings.shards(world, min(world, given.machine or world))
    placement = Placement(device, settings.dtype, shards, settings.gathered_ahead)
    experts = load_resident(
        recipe, given.opened, given.coefficients, given.data.tokenize, placement, given.asks.embedding
    )
    write_generated(given.data, given.opened, experts, settings.workspace)
    vectors = preprocess_with_examples(given, vectors, first, rest, experts)
    vectors = quantise_vectors(given, vectors)
    subspaces, residency = find_subspaces(given, vectors), place(given, vectors, experts)
    resident = experts.merging(vectors, subspaces, schedule.keep, residency)
    if schedule.recompute:
        recompute_blocks(resident.merged.module)
    start = measure_start(given, resident)
    with precision():
        teachers = record_experts(given, resident)
        if recipe.buffers == REESTIMATE:  # all steps use the statistics of the merge at the start
            resident.hold(statistics_at(resident, start, given.data))
    return Prepared(resident, start, teachers)


def split_at_examples(
    methods: Sequence[Preprocess],
) -> tuple[Sequence[Preprocess], Sequence[Preprocess]]:
    """The methods before the first that uses calibration examples, and the rest."""
    first = list(takewhile(lambda method: not isinstance(method, Informed), methods))
    return first, methods[len(first) :]


def preprocess_with_examples(
    given: FitInputs,
    vectors: TaskVectors,
    first: Sequence[Preprocess],
    rest: Sequence[Preprocess],
    experts: Resident,
) -> TaskVectors:
    """The task vectors after the `rest` of the methods, which run the experts on their examples."""
    if not rest:
        return vectors
    statistics = statistics_of(given, experts)
    with distributed.rank_zero_first():
        inputs = key_after(first, given.opened.identity())
        return apply(vectors, rest, given.settings.workspace, inputs, given.data.identity(), statistics)


def statistics_of(given: FitInputs, resident: Resident) -> ExpertStatistics:
    """The experts on their own calibration examples."""
    data, weights = given.data, [expert.weight for expert in given.recipe.experts.values()]
    return ExpertStatistics(resident, data.examples, data.tokenize, given.settings.workspace, weights=weights)


def quantise_vectors(given: FitInputs, vectors: TaskVectors) -> TaskVectors:
    """The task vectors of the fit: quantised if the settings ask for it."""
    if given.settings.quantise is None:
        return vectors
    with distributed.rank_zero_first():
        return quantised(vectors, given.settings.quantise, given.settings.workspace, given.identity())


def place(given: FitInputs, vectors: TaskVectors, experts: Resident) -> Residency:
    """Where this process holds its rows of the task vectors that every step reads."""
    rows = delta_shards(vectors.deltas, experts.merged.placed.shards)
    layout = given.opened.layout
    shares = {name: Share(rows[name].nbytes, 1 + (name in layout.learned)) for name in layout.groups}
    residency = reside(given.settings.vectors, shares, given.room)
    if residency.places and distributed.rank() == 0:
        print(f"base and task vectors: {residency}")
    return residency


def find_subspaces(given: FitInputs, vectors: TaskVectors) -> Mapping[str, Tensor]:
    """The experts' shared subspace [m, k] of each matrix, projected out of its gradient."""
    if not given.settings.subspace:
        return {}
    return shared_subspaces(vectors, given.settings.subspace, given.settings.workspace, given.identity())


def measure_start(given: FitInputs, resident: Resident) -> Tensor | None:
    """The starting coefficients of a preset that measures the experts."""
    if not isinstance(given.initial, MeasuredPreset):
        return None
    names, layout = tuple(given.recipe.experts), given.opened.layout
    return given.initial.measured(names, layout, statistics_of(given, resident))


def record_experts(given: FitInputs, resident: Resident) -> list[Record]:
    """The experts' outputs on their own examples, if the objective needs them."""
    if given.asks == Asks():
        return []
    data, settings = given.data, given.settings
    heads = [h.identity() if h else "" for h in task_heads(given.recipe, given.opened).values()]
    depends_on = [
        given.opened.identity(),
        *heads,
        *data.with_examples(data.examples).identities().values(),  # their contents, written texts' too
        recorded_tokenizer(data.tokenizer),
        data.max_length,
        settings.weights,
        torch.is_autocast_enabled(resident.device.type),
        *([resident.embedding.identity()] if resident.embedding else []),
    ]
    folder, budget = settings.workspace, settings.teacher_budget
    return record_teachers(
        resident, data.examples, data.tokenize, given.asks, folder, repr(depends_on), budget
    )
