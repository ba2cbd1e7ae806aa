"""Where the numbers of every task vector lie on disk: what remains of a comparison of names and shapes.

The comparison builds models without storage, by transformers and peft. Its outcome is plain text, which a run
keeps, so that an export needs neither.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from trainmerge.checkpoints.reader import Checkpoint, PickleFile, WeightFile
from trainmerge.kernels import ExpertWeight, LowRank, Term, Untouched
from trainmerge.system.safetensors_file import MappedFile
from trainmerge.task_vectors.delta import Delta, TaskVectors


@dataclass(frozen=True)
class FullSource:
    """An expert's weight."""

    file: str
    tensor: str


@dataclass(frozen=True)
class LowRankSource:
    """An adapter's two factors; `transposed` where the update is (scale up down)^T."""

    file: str
    up: str
    down: str
    transposed: bool
    scale: float


Source = FullSource | LowRankSource


@dataclass(frozen=True)
class Sources:
    """Every expert's sources by the base's tensor names; a name that is not there is untouched."""

    parameters: Sequence[str]  # the base's, in order
    tied: Mapping[str, str]  # tensor of the base's files -> the one that it must equal, where both are there
    experts: Mapping[str, Mapping[str, Source]]

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
        return Sources(tuple(data["parameters"]), data["tied"], experts)

    def open(self, base: Checkpoint) -> TaskVectors:
        """The task vectors, over mapped files: their headers are read."""
        files = _Files()
        deltas = {}
        for name in self.parameters:
            own = base.read(name)
            row = tuple(_term(places.get(name), own, files) for places in self.experts.values())
            if not all(isinstance(term, Untouched) for term in row):
                deltas[name] = Delta(own, row)
        return TaskVectors(tuple(self.experts), deltas)


@dataclass
class _Files:
    """Files of weights, each opened once."""

    opened: dict[str, WeightFile] = field(default_factory=dict)

    def read(self, file: str, tensor: str) -> Tensor:
        if file not in self.opened:
            self.opened[file] = PickleFile(Path(file)) if file.endswith(".bin") else MappedFile(file)
        return self.opened[file].read(tensor)


def _term(source: Source | None, base: Tensor, files: _Files) -> Term:
    match source:
        case None:
            return Untouched()
        case FullSource(file, tensor):
            return ExpertWeight(_rows(files.read(file, tensor), base))
        case LowRankSource(file, up_name, down_name, transposed, scale):
            up, down = files.read(file, up_name), files.read(file, down_name)
            return LowRank(up.T, down.T, scale) if transposed else LowRank(up, down, scale)


def _rows(weight: Tensor, base: Tensor) -> Tensor:
    """As many rows as the base has: tokens that the expert lacks keep the base's embedding.

    Only where the vocabulary was resized; a shorter one costs a copy of the tensor.
    """
    if weight.shape[:1] == base.shape[:1]:
        return weight
    if len(weight) > len(base):
        return weight[: len(base)]
    return torch.cat([weight, base[len(weight) :].to(weight.dtype)])
