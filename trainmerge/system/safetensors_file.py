"""Tensors on disk: mapped reads and streamed writes."""

import ctypes
import hashlib
import math
import mmap
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import torch
from torch import Tensor

from trainmerge.system.atomic import replacing
from trainmerge.system.disk_space import naming
from trainmerge.system.safetensors_format import DTYPES, Specs, header_of, read_header

WRITE_BLOCK = 1 << 24
# A private copy-on-write mapping: torch warns of read-only ones, and a stray write into those crashes.
# On Linux with MAP_NORESERVE (not in Python 3.11's mmap), because a file may be larger than memory.
MAPPING: dict[str, int] = {"access": mmap.ACCESS_COPY}
if sys.platform == "linux":
    MAPPING = {"flags": mmap.MAP_PRIVATE | 0x4000, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
# mmap's own method needs the mapping, but a tensor has only its address.
MADVISE = ctypes.CDLL(None).madvise if sys.platform == "linux" else None


class Hasher(Protocol):
    """The interface of `hashlib`'s objects."""

    def update(self, data: Any, /) -> None:
        """Add these bytes."""
        ...


class TensorInfo(NamedTuple):
    """One tensor's entry in a file's header."""

    dtype: torch.dtype
    shape: torch.Size
    file: Path
    begin: int = 0  # byte offset in the file

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.shape.numel() * self.dtype.itemsize


class MappedFile:
    """One safetensors file: reads and checks the header, and maps tensors on access.

    A mapped tensor uses the file's pages, not anonymous memory; the kernel can drop them when memory is
    short. Writing into one never changes the file, only this process's copy of the page. The file must not be
    truncated while it is mapped: the next read would raise SIGBUS.

    Raises FileNotFoundError for an absent file, ValueError for a damaged or incomplete one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such file. Check the path, or download it again.")
        header, data = read_header(self.path)
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        unknown = sorted({entry["dtype"] for entry in header.values()} - DTYPES.keys())
        if unknown:
            raise ValueError(f"{self.path}: unsupported dtypes {', '.join(unknown)}; convert to F32 or BF16")
        self.tensors = {
            name: TensorInfo(
                DTYPES[entry["dtype"]], torch.Size(entry["shape"]), self.path, data + entry["data_offsets"][0]
            )
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        }
        self._stat = _identity(self.path)
        self._map: mmap.mmap | None = None

    def read(self, name: str) -> Tensor:
        """The tensor `name`, mapped. Raises KeyError for a name that the header lacks."""
        info = self.tensors[name]
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        if self._map is None:
            self.check_unchanged()
            with naming(self.path), self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, **MAPPING)
        if info.begin % info.dtype.itemsize:  # files of old writers: copy, because kernels need aligned data
            raw = torch.frombuffer(self._map, dtype=torch.uint8, count=info.nbytes, offset=info.begin)
            return raw.clone().view(info.dtype).view(info.shape)
        count = info.shape.numel()
        return torch.frombuffer(self._map, dtype=info.dtype, count=count, offset=info.begin).view(info.shape)

    def check_unchanged(self) -> None:
        """Raise ValueError if the file was replaced, resized or written to since it was opened."""
        if not self.path.is_file() or _identity(self.path) != self._stat:
            raise ValueError(
                f"{self.path} changed since it was opened; start again, and let no other process write to it"
            )


def _identity(path: Path) -> tuple[int, int, int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def write_safetensors(
    path: str | Path,
    specs: Specs,
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
    hasher: Hasher | None = None,
) -> None:
    """Write `tensors`, an iterator in any order, in constant memory.

    A tensor may come in pieces of consecutive rows, interleaved with other tensors. The file appears under
    its name only when it is complete and on disk; the same input gives the same bytes. Leftovers of a killed
    process are removed first. `hasher` is updated with the file's bytes while writing; the tensors must then
    come in `file_order`. Raises ValueError if a tensor's name, dtype or shape differs from its spec, or a
    tensor is missing or surplus.
    """
    path = Path(path)
    header, offsets = header_of(path, specs, metadata or {})
    with replacing(path) as temporary, temporary.open("xb") as file:  # open() respects the umask
        _write_bytes(file, memoryview(header), hasher)
        _write_tensors(path, file, specs, tensors, {n: len(header) + o for n, o in offsets.items()}, hasher)
        file.flush()


def _write_tensors(
    path: Path,
    file: BinaryIO,
    specs: Specs,
    tensors: Iterable[tuple[str, Tensor]],
    places: Mapping[str, int],
    hasher: Hasher | None,
) -> None:
    """Write every piece at its place."""
    missing = {name: math.prod(shape) for name, (_, shape) in specs.items()}  # elements
    given: set[str] = set()
    for name, tensor in tensors:
        _check_piece(path, specs, name, tensor, missing.get(name, 0), name in given)
        written = math.prod(specs[name][1]) - missing[name]
        place = places[name] + written * tensor.dtype.itemsize
        if hasher is not None and place != file.tell():
            raise ValueError(f"{path}: {name} is not in the file's order, which hashing needs")
        file.seek(place)
        _write_bytes(file, _bytes_of(tensor), hasher)
        missing[name] -= tensor.numel()
        given.add(name)
    if absent := [name for name in specs if missing[name] or name not in given]:
        raise ValueError(f"{path}: tensors in the header but not written: {', '.join(absent)}")


def _check_piece(path: Path, specs: Specs, name: str, tensor: Tensor, missing: int, begun: bool) -> None:
    dtype, shape = specs.get(name, (None, ()))
    whole = tuple(tensor.shape) == tuple(shape) and not begun
    rows = 0 < tensor.dim() == len(shape) and tuple(tensor.shape[1:]) == tuple(shape[1:])
    if dtype != tensor.dtype or not (whole or (rows and 0 < tensor.numel() <= missing)):
        promised = (
            f"{dtype} {tuple(shape)}, of which {missing} numbers are missing" if dtype else "no such tensor"
        )
        got = f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{path}: got {got}, the header has {promised}")


def flat_bytes(tensor: Tensor) -> Tensor:
    """A tensor's bytes in order, one dimension of uint8; a view of a contiguous tensor's memory.

    A single number may have any stride, which a view of another size would refuse.
    """
    whole = tensor.detach().contiguous()
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)


def _bytes_of(tensor: Tensor) -> memoryview:
    return flat_bytes(tensor.cpu()).numpy().data


def _write_bytes(file: BinaryIO, values: memoryview, hasher: Hasher | None) -> None:
    for begin in range(0, len(values), WRITE_BLOCK):
        block = values[begin : begin + WRITE_BLOCK]
        file.write(block)
        if hasher is not None:
            hasher.update(block)


def read_ahead(tensor: Tensor) -> None:
    """Ask the kernel to read ahead a mapped tensor's pages; no effect on unmapped tensors."""
    if MADVISE is not None:
        begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        size = tensor.data_ptr() - begin + tensor.nbytes
        MADVISE(ctypes.c_void_p(begin), ctypes.c_size_t(size), mmap.MADV_WILLNEED)


def sha256(path: str | Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
