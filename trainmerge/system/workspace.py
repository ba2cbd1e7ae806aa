"""A cache of files named by a digest of their inputs."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from trainmerge.system.safetensors_file import MappedFile


def digest(text: str, length: int = 16) -> str:
    """The first hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def cached(path: Path, make: Callable[[Path], None]) -> MappedFile:
    """The file, created by `make` if it does not exist; `make` must write it atomically.

    Raises:
        ValueError: the file is damaged; it must be removed, and is made again.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)
    return open_cached(path)


def open_cached(path: Path) -> MappedFile:
    """An existing file of the cache.

    Raises:
        ValueError: the file is damaged; it must be removed, and is made again.
    """
    try:
        return MappedFile(path)
    except ValueError as error:
        raise ValueError(f"{error} Remove {path}: it is made again when it is needed.") from error
