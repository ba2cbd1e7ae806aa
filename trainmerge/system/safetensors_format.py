"""The format of a safetensors file: its dtypes, reading its header, and the header of a new file.

8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, the data.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from trainmerge.system.access import check_readable
from trainmerge.system.text import reason

Specs = Mapping[str, tuple[torch.dtype, torch.Size | tuple[int, ...]]]
HEADER_LIMIT = 100_000_000  # bytes; safetensors refuses to read a longer one
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header and the offset of tensor data. safetensors checks all but duplicate names and metadata.

    Raises:
        ValueError: damaged, incomplete, or not to be read.
    """
    check_readable(path)
    try:
        with safe_open(path, framework="np"), path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            pairs = json.loads(file.read(size), object_pairs_hook=_refuse_duplicates)
        if not isinstance(pairs.setdefault("__metadata__", {}), dict):
            raise ValueError(f"__metadata__ is {pairs['__metadata__']!r}, not a mapping")
        for entry in (entry for name, entry in pairs.items() if name != "__metadata__"):
            torch.Size(entry["shape"]).numel()
    except (SafetensorError, ValueError, RuntimeError, OverflowError, TypeError, OSError) as error:
        hint = f"({path.stat().st_size} bytes long). It is damaged or unfinished: download or save it again."
        raise ValueError(f"{path}: not a complete safetensors file: {reason(error)} {hint}") from error
    return pairs, 8 + size


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
    if twice:
        raise ValueError(f"duplicate names in the header: {', '.join(twice)}")
    return dict(pairs)


def file_order(specs: Specs) -> list[str]:
    """The order of the tensors in a file: widest dtypes first, so that all are aligned."""
    return sorted(specs, key=lambda name: -specs[name][0].itemsize)


def header_of(path: Path, specs: Specs, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header's bytes, and each tensor's offset after them."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets: dict[str, int] = {}
    end = 0
    for name in file_order(specs):
        dtype, shape = specs[name]
        offsets[name], end = end, end + math.prod(shape) * dtype.itemsize
        place = [offsets[name], end]
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": place}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise ValueError(f"{path}: a header of {len(text)} bytes is over {HEADER_LIMIT}; use shards")
    return len(text).to_bytes(8, "little") + text, offsets
