"""Sharded checkpoints of torch.distributed (DCP): a folder of `.distcp` files and their `.metadata`.

The metadata is a pickle. It is read by an unpickler that knows DCP's own classes, torch's plain values, paths
and ordered dictionaries only; tensors are read by torch's restricted unpickler. Of `getattr`, by which early
releases of Python 3.11 write a member of an enumeration, it knows that alone.
"""

import pickle
import warnings
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from typing_extensions import override

from trainmerge.system.text import shortened
from trainmerge.system.torch_file import METADATA

DISPATCH: dict[int, Any] = vars(pickle._Unpickler)["dispatch"]  # opcode -> what pickle does
FILL = DISPATCH[pickle.BUILD[0]]
LONGEST = 400  # characters of a reason
DCP = "torch.distributed.checkpoint"
KNOWN = {
    *(
        (f"{DCP}.metadata", name)
        for name in (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
            "TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )
    ),
    (f"{DCP}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
}  # fmt: skip


class ShardedFile:
    """The tensors of a sharded checkpoint; each is read on access.

    Args:
        folder: With `.metadata` and `.distcp` files.

    Raises:
        ValueError: damaged metadata, or objects other than DCP's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = _Reader(folder)
        self._bytes = sum(file.stat().st_size for file in folder.glob("*.distcp"))
        found = self._reader.read_metadata()
        try:
            self.entries = _entries(found)
            paths: dict[str, Any] = found.planner_data if isinstance(found.planner_data, dict) else {}
            self.paths: dict[str, Sequence[str]] = {
                name: [str(part) for part in paths.get(name, (name,))] for name in self.entries
            }
        except (
            AttributeError,
            TypeError,
            ValueError,
        ) as error:  # filled otherwise
            raise ValueError(f"{folder / METADATA}: no metadata of torch.distributed: {error}") from error

    def read(self, name: str) -> Tensor:
        """One tensor, whole, in memory."""
        entry = self.entries[name]
        if entry.size.numel() * entry.properties.dtype.itemsize > self._bytes:
            raise ValueError(f"{self.folder}: {name} is larger than the checkpoint's files")
        state = {name: torch.empty(entry.size, dtype=entry.properties.dtype)}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that no processes take part
                load(state, storage_reader=self._reader, no_dist=True)
        except (Exception, CheckpointException) as error:  # whatever the files' contents raise
            causes = [str(cause) for cause, _ in getattr(error, "failures", {}).values()] or [str(error)]
            words = shortened(" ".join(causes[0].split()), LONGEST)
            raise ValueError(f"{self.folder}: {name} cannot be read: {words}. Save it again") from error
        return state[name]

    def under(self, key: str) -> Iterator[tuple[str, str]]:
        """(name within, name) of the tensors under a first key; of all, if it is empty."""
        for name, path in self.paths.items():
            if not key:
                yield ".".join(path), name
            elif path[0] == key and len(path) > 1:
                yield ".".join(path[1:]), name
            elif name.startswith(f"{key}."):
                yield name.removeprefix(f"{key}."), name


def _entries(found: Metadata) -> dict[str, TensorStorageMetadata]:
    """The tensors of the metadata, by name.

    Raises:
        ValueError: one has no size, or no dtype.
        AttributeError, TypeError: there are no tensors.
    """
    every = found.state_dict_metadata.items()
    entries = {str(name): entry for name, entry in every if isinstance(entry, TensorStorageMetadata)}
    for name, entry in entries.items():
        if not isinstance(entry.size, torch.Size) or not isinstance(entry.properties.dtype, torch.dtype):
            raise ValueError(f"{name} has no size or no dtype")
    return entries


class _Reader(FileSystemReader):
    """DCP's reader with an unpickler that knows few classes; it reads the metadata once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder
        self._found: Metadata | None = None

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata of all files.

        Raises:
            ValueError: as for `ShardedFile`.
        """
        del args, kwargs
        if self._found is None:
            self._found = self._load()
        return self._found

    def _load(self) -> Metadata:
        file = self._folder / METADATA
        try:
            with file.open("rb") as stream:
                found = _Unpickler(stream).load()
        except Exception as error:  # whatever a damaged pickle raises
            raise ValueError(f"{file}: no metadata of torch.distributed: {error}") from error
        if not isinstance(found, Metadata):
            raise ValueError(f"{file}: no metadata of torch.distributed: a {type(found).__name__}")
        if isinstance(meta := getattr(found, "storage_meta", None), StorageMeta):
            meta.load_id = self.load_id
        return found


def _member(kind: object, name: str) -> Enum:
    """The member of this name of an enumeration.

    Raises:
        pickle.UnpicklingError: an attribute of anything else.
    """
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(
            f"it asks for the attribute {name}, which is no member of an enumeration"
        )
    return kind[name]


class _Unpickler(pickle._Unpickler):  # in Python: C's has no table of opcodes
    """DCP's dataclasses, torch's dtypes and layouts, and containers; it fills objects, never classes."""

    stack: list[Any]

    def load_build(self) -> None:
        """Fill an object with its state.

        Raises:
            pickle.UnpicklingError: it is a class or a function, which everybody shares.
        """
        if isinstance(self.stack[-2], type | FunctionType):
            raise pickle.UnpicklingError("it changes a class")
        FILL(self)

    dispatch: ClassVar[dict[int, Any]] = {**DISPATCH, pickle.BUILD[0]: load_build}

    @override
    def find_class(self, module: str, name: str) -> Any:
        """The class of this name.

        Raises:
            pickle.UnpicklingError: another one.
        """
        if (module, name) == ("builtins", "getattr"):
            return _member
        plain = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in KNOWN and not plain:
            raise pickle.UnpicklingError(f"it has {module}.{name}, which such a checkpoint does not need")
        return super().find_class(module, name)
