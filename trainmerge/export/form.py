"""The form of an exported checkpoint: its dtype, and how tensors are divided among files.

By default both are the base's.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from trainmerge.checkpoints import Checkpoint
from trainmerge.system.memory import parse_size
from trainmerge.system.ranges import check_fields
from trainmerge.system.safetensors_file import TensorInfo

DtypeName = Literal["float32", "bfloat16", "float16"]
SHARD = "5GB"  # where the base's division does not fit
DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class Form:
    """How a merge is written.

    Args:
        dtype: The dtype of all floating-point tensors, each rounded once from float32 sums; None is each
            tensor's own in the base.
        shard_size: The most bytes of tensors per file, such as `5GB`; a larger tensor has a file of its own.
            None is the base's division.
    """

    dtype: DtypeName | None = None
    shard_size: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "export")
        if self.shard_size is not None and parse_size(self.shard_size) < 1:
            raise ValueError(f"export.shard_size is {self.shard_size!r}: a file holds at least one byte")

    def dtype_of(self, info: TensorInfo) -> torch.dtype:
        """The dtype of a tensor of the base's files after the export; integers keep theirs."""
        if self.dtype is None or not info.dtype.is_floating_point:
            return info.dtype
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def headers(self, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """The headers of these tensors after the export."""
        return {name: info._replace(dtype=self.dtype_of(info)) for name, info in tensors.items()}

    def size_of(self, info: TensorInfo) -> int:
        """The bytes of a tensor after the export."""
        return int(info.shape.numel()) * self.dtype_of(info).itemsize

    def shards(self, base: Checkpoint) -> dict[str, tuple[str, ...]]:
        """File name in the export -> its tensors, all as safetensors."""
        if self.shard_size is None:
            return shard_names(base)
        return divided({name: self.size_of(info) for name, info in base.tensors.items()}, self.shard_size)

    def to_json(self) -> dict[str, str]:
        """The choices that differ from the base's form; `Form(**...)` reads them back."""
        return {key: value for key, value in vars(self).items() if value is not None}

    @classmethod
    def read(cls, content: Any, where: Path) -> "Form":
        """Undo `to_json`; None is the base's form.

        Raises:
            ValueError: another content.
        """
        try:
            return cls(**(content or {}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: its `form` is damaged ({error}). Export the run again.") from error


def divided(sizes: Mapping[str, int], shard_size: str = SHARD) -> dict[str, tuple[str, ...]]:
    """File name -> its tensors: in order, at most so many bytes per file, or one tensor."""
    files: list[list[str]] = [[]]
    limit, filled = parse_size(shard_size), 0
    for name, size in sizes.items():
        if files[-1] and filled + size > limit:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    if len(files) == 1:
        return {"model.safetensors": tuple(files[0])}
    return {
        f"model-{number:05}-of-{len(files):05}.safetensors": tuple(names)
        for number, names in enumerate(files, start=1)
    }


def shard_names(base: Checkpoint) -> dict[str, tuple[str, ...]]:
    """File name in an export -> its tensors: the base's files, as safetensors."""
    return {
        Path(file.name.replace("pytorch_model", "model")).with_suffix(".safetensors").name: names
        for file, names in base.shards.items()
    }


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write a folder's config.json."""
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_dtype(config: Path, dtype: str) -> None:
    """Change the dtype that a config.json names, in all parts of a composed model."""
    content = json.loads(config.read_text(encoding="utf-8"))
    made = _with_dtype(content, dtype)
    if not any(key in content for key in DTYPE_KEYS):
        made["dtype"] = dtype
    config.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


def _with_dtype(content: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    return {
        key: dtype
        if key in DTYPE_KEYS and isinstance(value, str)
        else _with_dtype(value, dtype)
        if isinstance(value, Mapping)
        else value
        for key, value in content.items()
    }
