"""Batch norms' statistics of merges with one coefficient for all experts, by the recipe's rule."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from trainmerge.data.calibration import Calibration
from trainmerge.model.resident import Resident
from trainmerge.model.statistics import reestimated
from trainmerge.run.folder import RunFolder
from trainmerge.run.merge_buffers import REESTIMATE
from trainmerge.run.opened import Opened
from trainmerge.run.recipe import Recipe
from trainmerge.run.run_data import run_data
from trainmerge.task_vectors.buffers import holding
from trainmerge.task_vectors.state_dicts import STATISTICS


@dataclass(frozen=True)
class UniformBuffers:
    """The statistics of such merges: the base's own at 0, else those of the module, or measured on `data`."""

    resident: Resident
    base: Mapping[str, Tensor]  # by the module's names
    data: Calibration | None = None

    @contextmanager
    def of(self, coefficient: float) -> Iterator[None]:
        """In this context the resident model, which is this merge, has its statistics."""
        if coefficient == 0.0:
            values = self.base
        elif self.data is None:
            values = {}
        else:
            found = reestimated(self.resident, self.data)
            values = {self.resident.buffers[name]: tensor for name, tensor in found.items()}
        with torch.no_grad(), holding(self.resident.merged.module, values):
            yield


def uniform_buffers(folder: RunFolder, recipe: Recipe, opened: Opened, resident: Resident) -> UniformBuffers:
    """The statistics of such merges beside a run's."""
    own = {name: inside for name, inside in resident.buffers.items() if STATISTICS.search(name)}
    base = {inside: opened.base.read(name) for name, inside in own.items()}
    return UniformBuffers(resident, base, run_data(folder, recipe) if recipe.buffers == REESTIMATE else None)
