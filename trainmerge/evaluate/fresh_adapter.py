"""The control `fresh LoRA`: one new adapter of the base instead of a merge, learned as the run was.

The same unlabeled examples in the same order, the same objective, task weights and number of steps. What it
reaches needs no expert's weights, only their outputs.

Legend: `K` experts.
"""

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from trainmerge.data.batch import Asks, Batch
from trainmerge.data.calibration import Calibration
from trainmerge.data.columns import Columns
from trainmerge.data.steps import Steps
from trainmerge.evaluate.controls import FRESH, RANK
from trainmerge.model.adapted import LowRankChange, adapted, new_changes
from trainmerge.model.embedding import read_embedding
from trainmerge.model.resident import Resident
from trainmerge.model.teachers import Record, record_teachers
from trainmerge.objectives import Alignment, Objective
from trainmerge.run.config import build
from trainmerge.run.folder import RunFolder
from trainmerge.run.generated_texts import read_generated
from trainmerge.run.manifest import read_manifest
from trainmerge.run.opened import Opened
from trainmerge.run.recipe import Recipe
from trainmerge.run.recipe_files import calibration_files
from trainmerge.run.saved import scored_with
from trainmerge.system import distributed

RATE = 1e-3  # Adam's learning rate
STEPS = 100  # beside a merge that took none, by the alignment of outputs
SETTINGS = {"objective": dict, "teacher_budget": int}  # in the manifest


@dataclass(frozen=True)
class FreshAdapter:
    """What a run's adapter learns from.

    Args:
        resident: The run's merge.
        weights: The tasks' weights, K.
        objective: The loss of a batch.
        data: The run's calibration examples, without its held-out ones.
        steps: The number of steps.
        budget: Bytes of the experts' recorded probabilities.
    """

    resident: Resident
    weights: Sequence[float]
    objective: Objective
    data: Calibration
    steps: int
    budget: int

    @staticmethod
    def of(folder: RunFolder, recipe: Recipe, opened: Opened, resident: Resident) -> "FreshAdapter":
        """For a run and its merge in memory.

        Raises:
            ValueError: the run's calibration examples are not where its recipe says.
        """
        manifest = read_manifest(folder.manifest, SETTINGS)
        settings = manifest["data"] | {
            "columns": Columns(**manifest["data"]["columns"]),
            "tokenizer": recipe.tokenizer_folder(folder.workspace),
        }
        data = Calibration(calibration_files(recipe), **settings)
        if absent := [name for name in recipe.experts if name not in data.files]:
            raise ValueError(f"recipe.experts: no calibration examples of {', '.join(absent)}")
        read_generated(data, opened, folder.workspace)
        steps = int(scored_with(folder).get("step", 0))
        objective: Objective = build(Objective, manifest["objective"], folder.manifest)  # type: ignore[type-abstract]
        if not steps and objective.needs_logits:
            objective = Alignment()
        if pooling := objective.asks.embedding:
            resident = replace(resident, embedding=read_embedding(opened.base, pooling))
        weights = [expert.weight for expert in recipe.experts.values()]
        return FreshAdapter(resident, weights, objective, data, steps or STEPS, manifest["teacher_budget"])

    @contextmanager
    def learned(self) -> Iterator[None]:
        """In this context the model is the base with the learned adapter; then the merge again."""
        with tempfile.TemporaryDirectory() as own:
            records = self._records(Path(distributed.broadcast(own)))
            changes = new_changes(self.resident.merged, RANK, self.data.seed)
            if distributed.rank() == 0:
                print(f"learning {FRESH} on {len(changes)} linear layers, {self.steps} steps", flush=True)
            with adapted(self.resident.merged, changes):
                self._learn([*changes.values()], records)
                yield

    def _records(self, folder: Path) -> list[Record]:
        """The experts' outputs on their own examples, K; empty if the objective needs none."""
        if self.objective.asks == Asks():
            return []
        asks, data = self.objective.asks, self.data
        return record_teachers(self.resident, data.examples, data.tokenize, asks, folder, "", self.budget)

    def _learn(self, changes: Sequence[LowRankChange], records: Sequence[Record]) -> None:
        data, optimizer = (
            self.data,
            torch.optim.Adam([p for own in changes for p in (own.down, own.up)], RATE),
        )
        steps = Steps(data.examples, data.tokenize, data.batch_size, data.seed)
        with torch.enable_grad():
            for step in range(self.steps):
                for batch in steps[step]:
                    self._loss(batch, records).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()

    def _loss(self, batch: Batch, records: Sequence[Record]) -> torch.Tensor:
        """The weighted loss of one expert's batch."""
        device = self.resident.device
        inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
        batch = self.resident.counted(batch._replace(inputs=inputs, mask=batch.mask.to(device)))
        if records:
            batch = batch._replace(teacher=records[batch.expert].of(batch.ids, device))
        losses = self.objective(self.resident(batch, self.objective.asks.layers), batch)
        return self.weights[batch.expert] * losses.mean()


def fresh_adapter(
    folder: RunFolder, recipe: Recipe, opened: Opened, resident: Resident
) -> AbstractContextManager[None] | None:
    """In this context the model is the base with a run's adapter; None without its calibration examples.

    A warning says why there is none.
    """
    try:
        return FreshAdapter.of(folder, recipe, opened, resident).learned()
    except (ValueError, FileNotFoundError) as error:
        warnings.warn(f"controls without a fresh LoRA, which learns from examples: {error}", stacklevel=2)
        return None
