"""Where a checkpoint was loaded from, which transformers and peft note in its JSON files.

A hub id (`org/name`) stays; a path tells strangers about the machine that trained the model, and is left out.
"""

import json
import re
from pathlib import Path
from typing import Any

KEYS = ("_name_or_path", "name_or_path", "base_model_name_or_path")
MARK = b'name_or_path"'  # in every file with one of the keys
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def without_local_origins(content: bytes) -> bytes:
    """A JSON file's bytes without keys of local paths; the same bytes if it has none, or is not an object."""
    if MARK not in content:
        return content
    try:
        data = json.loads(content)
        cleaned = _cleaned(data)
    except (ValueError, RecursionError):  # not ours to mend
        return content
    if cleaned == data:
        return content
    return (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()


def _cleaned(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _cleaned(value) for key, value in data.items() if key not in KEYS or not _is_path(value)}
    return [_cleaned(item) for item in data] if isinstance(data, list) else data


def _is_path(value: Any) -> bool:
    """Whether it is no hub id, or one by its form that is a folder here."""
    if not isinstance(value, str) or not value:
        return False
    return HUB_ID.fullmatch(value) is None or Path(value).exists()
