"""The places on disk of every task vector: the result of comparing names and shapes.

The comparison builds meta models with transformers and peft. Its result is plain text, saved with a run, so
that an export needs neither.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from trainmerge.checkpoints.reader import Checkpoint
from trainmerge.checkpoints.tensor_file import PickleFile, WeightFile
from trainmerge.kernels import ExpertWeight, LowRank, Term, Untouched
from trainmerge.system.safetensors_file import MappedFile
from trainmerge.task_vectors.delta import Delta, TaskVectors
from trainmerge.task_vectors.roles import Role


@dataclass(frozen=True)
class FullSource:
    """An expert's weight."""

    file: str
    tensor: str


@dataclass(frozen=True)
class LowRankSource:
    """An adapter's two factors; `transposed` if the update is (scale up down)^T."""

    file: str
    up: str
    down: str
    transposed: bool
    scale: float


Source = FullSource | LowRankSource


@dataclass(frozen=True)
class Sources:
    """Every expert's sources by the base's tensor names; absent names are unchanged."""

    parameters: Sequence[str]  # the base's, in order
    tied: Mapping[str, str]  # tensor of the base's files -> the one that it must equal, if both exist
    experts: Mapping[str, Mapping[str, Source]]
    roles: Mapping[str, Role] = field(default_factory=dict)  # of the parameters, by the modules
    statistics: Mapping[str, Mapping[str, FullSource]] = field(
        default_factory=dict
    )  # of batch norms, if changed

    def to_json(self) -> str:
        """A text that `from_json` reads back."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Sources":
        """Undo `to_json`. Raises KeyError or TypeError for another text."""
        data = json.loads(text)
        experts = {
            expert: {
                name: LowRankSource(**place) if "up" in place else FullSource(**place)
                for name, place in places.items()
            }
            for expert, places in data["experts"].items()
        }
        own = {
            expert: {name: FullSource(**place) for name, place in places.items()}
            for expert, places in data.get("statistics", {}).items()  # absent in files of older versions
        }
        return Sources(tuple(data["parameters"]), data["tied"], experts, data["roles"], own)

    def open(self, base: Checkpoint) -> TaskVectors:
        """The task vectors over mapped files; reads their headers."""
        files = OpenedFiles()
        deltas = {}
        for name in self.parameters:
            own = base.read(name)
            row = tuple(_term(places.get(name), own, files) for places in self.experts.values())
            if not all(isinstance(term, Untouched) for term in row):
                deltas[name] = Delta(own, row, self.roles.get(name, ""))
        return TaskVectors(tuple(self.experts), deltas)

    def own_statistics(self, base: Checkpoint) -> list[dict[str, Tensor]]:
        """Each expert's running means and variances of batch norms, K, of those that any expert changed."""
        files, changed = OpenedFiles(), {name: None for own in self.statistics.values() for name in own}
        return [
            {
                name: files.read(own[name].file, own[name].tensor) if name in own else base.read(name)
                for name in changed
            }
            for own in (self.statistics.get(expert, {}) for expert in self.experts)
        ]


@dataclass
class OpenedFiles:
    """Weight files, each opened once."""

    opened: dict[str, WeightFile] = field(default_factory=dict)

    def read(self, file: str, tensor: str) -> Tensor:
        """One tensor, mapped."""
        if file not in self.opened:
            self.opened[file] = PickleFile(Path(file)) if file.endswith(".bin") else MappedFile(file)
        return self.opened[file].read(tensor)


def _term(source: Source | None, base: Tensor, files: OpenedFiles) -> Term:
    match source:
        case None:
            return Untouched()
        case FullSource(file, tensor):
            return ExpertWeight(match_rows(files.read(file, tensor), base))
        case LowRankSource(file, up_name, down_name, transposed, scale):
            up, down = files.read(file, up_name), files.read(file, down_name)
            return LowRank(up.T, down.T, scale) if transposed else LowRank(up, down, scale)


def match_rows(weight: Tensor, base: Tensor) -> Tensor:
    """The tensor with the base's number of rows: tokens that the expert lacks get the base's embedding.

    Only if the vocabulary was resized; a smaller one costs a copy of the tensor.
    """
    if weight.shape[:1] == base.shape[:1]:
        return weight
    if len(weight) > len(base):
        return weight[: len(base)]
    return torch.cat([weight, base[len(weight) :].to(weight.dtype)])
