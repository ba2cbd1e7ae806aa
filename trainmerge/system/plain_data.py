"""Limits of plain data from files: deeper or larger data than any honest file has."""

from collections.abc import Mapping
from typing import Any

DEEPEST = 100  # levels; Python's own limit would end a walk with a RecursionError
MOST = 10_000_000  # values, each alias of YAML counted


def text_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json about its language model: `text_config`, or all of it."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def check_plain(data: Any) -> None:
    """Raise ValueError for data nested too deeply, within itself, or with too many values."""
    left, count = [(data, 0)], 0
    while left:
        value, depth = left.pop()
        count += 1
        if depth > DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} levels deep")
        if count > MOST:
            raise ValueError(f"more than {MOST} values")
        if isinstance(value, Mapping):
            left += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list | tuple | set):
            left += [(item, depth + 1) for item in value]
