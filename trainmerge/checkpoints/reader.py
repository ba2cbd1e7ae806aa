"""A transformers checkpoint folder: checks every file, header and name, and reads no weight.

Three layouts: one `model.safetensors`, shards named by `model.safetensors.index.json`, and the pickled forms
    of both (`pytorch_model.bin`), which need `allow_pickle`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PureWindowsPath
from types import MappingProxyType
from typing import Any

from torch import Tensor

from trainmerge.checkpoints.foreign import refuse_foreign
from trainmerge.checkpoints.side_modules import SideTensor, side_weights
from trainmerge.checkpoints.tensor_file import PickleFile, WeightFile
from trainmerge.checkpoints.weight_files import (
    ADAPTER,
    PICKLE,
    SAFETENSORS,
    check_one_generation,
    find_weights,
    read_folder_json,
)
from trainmerge.checkpoints.whole import check_whole
from trainmerge.system.atomic import seen_from
from trainmerge.system.safetensors_file import MappedFile, TensorInfo
from trainmerge.system.text import shortened


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint folder. `tensors` are headers; `read` maps one tensor."""

    path: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    config: dict[str, Any]  # config.json
    shards: Mapping[Path, tuple[str, ...]]  # file -> its tensors, in file order
    sources: Mapping[Path, WeightFile]
    known_ties: Mapping[str, str] | None = None  # `tied`, if known already
    side: Mapping[str, SideTensor] = field(default_factory=dict)  # of modules after the model: `side_weights`
    origin: Path | None = None  # the base's own folder, if `path` is one of a chosen tokenizer
    rows: Path | None = None  # the file of its embeddings then, if they have other rows than the base's

    def read(self, name: str) -> Tensor:
        """The tensor `name`, mapped: no memory of its own. Raises KeyError for an unknown name."""
        if name in self.side:
            return self.side[name].source.read(self.side[name].name)
        return self.sources[self.tensors[name].file].read(name)

    def info(self, name: str) -> TensorInfo:
        """The header of the tensor `name`, in the model's files or in those of a module after it."""
        return self.side[name].info if name in self.side else self.tensors[name]

    @cached_property
    def tied(self) -> dict[str, str]:
        """Tensor -> the one that it must equal, if the files have both: `lm_head.weight` -> the embedding.

        Raises ValueError if transformers does not know the architecture.
        """
        if self.known_ties is not None:
            return dict(self.known_ties)
        from trainmerge.checkpoints.tensor_names import ties_of  # imports transformers: only if needed

        return ties_of(self.path, self.tensors)

    def check_unchanged(self) -> None:
        """Raise ValueError if a safetensors file changed since it was opened."""
        for source in [*self.sources.values(), *(tensor.source for tensor in self.side.values())]:
            if isinstance(source, MappedFile):
                source.check_unchanged()


def open_checkpoint(
    path: str | Path, allow_pickle: bool = False, known_ties: Mapping[str, str] | None = None
) -> Checkpoint:
    """Open a checkpoint folder; reads headers only. With `known_ties`, `tied` does not need transformers.

    Raises:
        FileNotFoundError: the folder, config.json, the weights, or a shard of the index is missing.
        ValueError: a state dict or another foreign format, a damaged file, an export that is not whole, an
            index that contradicts its shards, only pickled weights, two generations of them.
    """
    path = Path(path)
    refuse_foreign(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: not a folder{seen_from(path)}. Name a checkpoint folder on disk; download it first."
        )
    check_one_generation(path)
    if (path / ADAPTER).is_file() and not (path / "config.json").is_file():
        raise ValueError(f"{path}: a peft adapter, not a full model. Name the model that it was trained on.")
    check_whole(path)
    config = read_folder_json(path / "config.json")
    files, index = find_weights(path, SAFETENSORS, PICKLE, allow_pickle)
    sources: dict[Path, WeightFile] = {
        file: PickleFile(file) if file.suffix == ".bin" else MappedFile(file) for file in files
    }
    _check_index(path, index, sources)
    tensors = {name: info for source in sources.values() for name, info in source.tensors.items()}
    shards = {file: tuple(source.tensors) for file, source in sources.items()}
    return Checkpoint(
        path,
        tuple(files),
        MappingProxyType(tensors),
        config,
        MappingProxyType(shards),
        MappingProxyType(sources),
        known_ties,
        MappingProxyType(side_weights(path, allow_pickle)),
    )


def _check_index(path: Path, index: dict[str, str] | None, sources: Mapping[Path, WeightFile]) -> None:
    """Raise ValueError unless index and shards agree and every tensor is in one shard only."""
    homes: dict[str, list[str]] = {}
    for file, source in sources.items():
        for name in source.tensors:
            homes.setdefault(name, []).append(file.relative_to(path).as_posix())
    problems = [f"{name} is in {' and in '.join(files)}" for name, files in homes.items() if len(files) > 1]
    if index is not None:
        for name, home in index.items():
            if PureWindowsPath(home).as_posix() not in homes.get(name, []):
                problems.append(f"{name} is not in {home}, which the index names")
        problems += [
            f"{name} of {files[0]} is not in the index" for name, files in homes.items() if name not in index
        ]
    if problems:
        words = shortened("; ".join(problems), 2000)
        raise ValueError(f"{path}: the index contradicts its shards: {words}. Save it again.")
