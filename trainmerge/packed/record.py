"""`packed.json`: the description of a folder of packed experts, written and read."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainmerge.checkpoints.whole import PACKED
from trainmerge.packed.codec import Codec
from trainmerge.system.json_file import read_json
from trainmerge.system.safetensors_format import DTYPE_NAMES, DTYPES
from trainmerge.task_vectors.delta import Delta

VERSION = 1
REMEDY = "Export the run again."
NONE = "none"  # codec of a parameter that has the base's values


@dataclass(frozen=True)
class Entry:
    """One packed parameter."""

    shape: Sequence[int]
    dtype: str  # the base's, as safetensors has it
    codec: str


@dataclass(frozen=True)
class TaskHead:
    """A task's own head: the class's tensor -> the base's, and the class's config.json."""

    shared: Mapping[str, str]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class PackedRecord:
    """The content of `packed.json`.

    Args:
        base: `path`, an id with its commit or a path from this folder on, and `sha256` of its files.
        tasks: Their names.
        tensors: Packed parameter -> shape, dtype and codec.
        options: The options of the export.
        files: The safetensors files.
        tied: Tensor of the base's files -> the parameter that it must equal.
        bits: Bits per weight and task, over the weights that some expert changes.
        bytes: Bytes of the packed tensors, without heads.
        errors: Task -> relative error of its difference.
        heads: Task -> its own head.
        router: What the router was fitted on, and its accuracy.
    """

    base: Mapping[str, Any]
    tasks: Sequence[str]
    tensors: Mapping[str, Entry]
    options: Mapping[str, Any]
    files: Sequence[str]
    tied: Mapping[str, str]
    bits: float
    bytes: int
    errors: Mapping[str, float]
    heads: Mapping[str, TaskHead] = field(default_factory=dict)
    router: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """As it is written."""
        return {"version": VERSION, **asdict(self)}


def entry(delta: Delta, codec: Codec | None) -> Entry:
    """One parameter's."""
    return Entry(list(delta.shape), DTYPE_NAMES[delta.base.dtype], codec.name if codec else NONE)


def read_record(folder: Path) -> PackedRecord:
    """Read and check `packed.json`.

    Raises:
        FileNotFoundError: no folder of packed experts.
        ValueError: of another version, or damaged.
    """
    path = folder / PACKED
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; {folder} is no folder of packed experts, as `trainmerge export RUN OUT "
            "--as packed` writes them"
        )
    content = read_json(path, REMEDY)
    version = content.pop("version", None)
    if version != VERSION:
        raise ValueError(f"{path}: version {version!r}, this trainmerge reads {VERSION}. {REMEDY}")
    try:
        content["tensors"] = {str(name): Entry(**one) for name, one in content["tensors"].items()}
        content["heads"] = {str(task): TaskHead(**one) for task, one in content["heads"].items()}
        record = PackedRecord(**content)
        _check(record)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error}). {REMEDY}") from error
    return record


def _check(record: PackedRecord) -> None:
    """Raise ValueError for content that no export has."""
    names = [*record.tasks, *record.files, *record.tied.values(), record.base["path"]]
    if not all(isinstance(name, str) for name in names) or len(set(record.tasks)) < len(record.tasks):
        raise ValueError("names")
    if any(Path(file).name != file for file in record.files):
        raise ValueError("files outside of the folder")
    for name, one in record.tensors.items():
        if one.dtype not in DTYPES or not all(type(size) is int and size >= 0 for size in one.shape):
            raise ValueError(f"shape or dtype of {name}")
    if record.router is not None and not (
        isinstance(record.router["max_length"], int) and isinstance(record.router["ignore"], list)
    ):
        raise ValueError("router")
    if not isinstance(record.base["sha256"], dict) or record.heads.keys() - set(record.tasks):
        raise ValueError("base or heads")
