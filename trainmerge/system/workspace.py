"""A cache of files named by a digest of their inputs."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from trainmerge.system.safetensors_file import MappedFile


def digest(text: str, length: int = 16) -> str:
    """The first hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def cached(path: Path, make: Callable[[Path], None]) -> MappedFile:
    """The file, created by `make` if it does not exist; `make` must write it atomically."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)
    return MappedFile(path)
