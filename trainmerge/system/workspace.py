"""A cache of files named by a digest of their inputs."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from trainmerge.system.access import check_folder_place
from trainmerge.system.json_file import parse_json
from trainmerge.system.safetensors_file import MappedFile

VOCABULARY = "vocabulary-"  # begins the name of a folder with a merge's tokenizer; a digest follows


def digest(text: str, length: int = 16) -> str:
    """The first hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def cached(path: Path, make: Callable[[Path], None]) -> MappedFile:
    """The file, created by `make` if it does not exist; `make` must write it atomically.

    Raises:
        ValueError: the file is damaged; it must be removed, and is made again. Or it cannot be written, which
            is asked before the work.
    """
    if not path.exists():
        check_folder_place(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)
    return open_cached(path)


def metadata_of(file: MappedFile, key: str, tensors: Iterable[str] = ()) -> Any:
    """A JSON value of the metadata of a file of the cache, which must have these tensors.

    Raises:
        ValueError: it lacks the value or a tensor, or the value is not JSON: the file must be removed.
    """
    remedy = f"Remove {file.path}: it is made again when it is needed."
    if lost := [name for name in tensors if name not in file.tensors]:
        raise ValueError(f"{file.path}: damaged: it has no tensor {lost[0]!r}. {remedy}")
    if not isinstance(text := file.metadata.get(key), str):
        raise ValueError(f"{file.path}: damaged: its header has no {key!r}. {remedy}")
    return parse_json(text, f"{file.path}: {key!r} of its header", remedy)


def open_cached(path: Path) -> MappedFile:
    """An existing file of the cache.

    Raises:
        ValueError: the file is damaged; it must be removed, and is made again.
    """
    try:
        return MappedFile(path)
    except ValueError as error:
        raise ValueError(f"{error} Remove {path}: it is made again when it is needed.") from error
