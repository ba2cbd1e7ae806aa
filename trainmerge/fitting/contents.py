"""SHA-256 of a user's own batches and state dicts, by their contents."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from trainmerge.system.safetensors_file import flat_bytes


def content_sha256(value: Any) -> str:
    """Of tensors, arrays, numbers and texts, in lists, mappings and objects' attributes.

    Raises:
        ValueError: something else is in it, or it contains itself.

    >>> content_sha256([1, "a"]) == content_sha256((1, "a")), content_sha256([1]) == content_sha256([1.0])
    (True, False)
    """
    found = hashlib.sha256()
    try:
        _feed(found, value)
    except RecursionError as error:
        raise ValueError(f"a {type(value).__name__} contains itself") from error
    return found.hexdigest()


def _feed(found: Any, value: Any) -> None:
    match value:
        case Tensor():
            found.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
            found.update(flat_bytes(value.cpu()).numpy())
        case np.ndarray() if value.dtype != object:
            found.update(f"array {value.dtype} {value.shape};".encode())
            found.update(np.ascontiguousarray(value).tobytes())
        case None | bool() | int() | float() | str() | bytes():
            found.update(f"{type(value).__name__} {value!r};".encode())
        case Mapping():
            found.update(f"mapping {len(value)};".encode())
            for key, item in value.items():
                _feed(found, key)
                _feed(found, item)
        case list() | tuple() | np.ndarray():
            found.update(f"list {len(value)};".encode())
            for item in value:
                _feed(found, item)
        case _:
            if not hasattr(value, "__dict__") or isinstance(value, type) or callable(value):
                raise ValueError(f"the contents of a {type(value).__name__} cannot be compared")
            _feed(found, vars(value))
