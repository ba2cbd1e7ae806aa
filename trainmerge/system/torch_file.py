"""Files of torch.save, read by torch's restricted unpickler, which runs no code."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainmerge.system.access import check_readable

METADATA = ".metadata"  # of a sharded checkpoint (`system.sharded_file`)


def load_torch(path: Path, mmap: bool = False) -> Any:
    """The contents of a file in torch's zip format, on the CPU; `mmap` maps the tensors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, of another format, or with objects that would run code; the text is the reason.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    check_readable(path)
    try:
        _check_zip(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # the unpickler lets through what the objects' constructors raise
        lines = str(error).splitlines()
        raise ValueError(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__) from error


def check_tensors(state: Any, path: Path) -> dict[str, Tensor]:
    """A dictionary of ordinary tensors.

    Raises:
        ValueError: something else; or a tensor that is sparse, quantised, or larger than the file.
    """
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("not a dictionary of tensors")
    size = path.stat().st_size
    for name, tensor in state.items():
        plain = tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"
        if not isinstance(name, str) or not plain or tensor.numel() * tensor.element_size() > size:
            raise ValueError(f"{name!r} is not an ordinary tensor within the file")
    return state


def _check_zip(path: Path) -> None:
    """Raise ValueError unless it is a zip archive without compression, as torch writes: so no bomb."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("a compressed archive, which torch does not write")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("entries that are larger than the file")
