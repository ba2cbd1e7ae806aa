"""Read JSON files, with errors that name the file."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from trainmerge.system.plain_data import check_plain
from trainmerge.system.text import reason


def parse_json(text: str | bytes, where: str | Path, remedy: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON in UTF-8, has a key twice, or is nested too deeply; names `where`, and the
            remedy.
    """
    try:
        value = json.loads(
            text.decode("utf-8") if isinstance(text, bytes) else text, object_pairs_hook=_unique
        )
        check_plain(value)
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{where}: not valid JSON: {reason(error)}. {remedy}") from error
    return value


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file; with the remedy.
        ValueError: it cannot be read, is not JSON in UTF-8, or not an object; with the remedy.
    """
    value = read_value(path, remedy)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object, but a {type(value).__name__}. {remedy}")
    return value


def read_value(path: Path, remedy: str) -> Any:
    """The value in a JSON file. Raises as `read_json`, for any value."""
    return parse_json(read_bytes(path, remedy), path, remedy)


def read_bytes(path: Path, remedy: str) -> bytes:
    """The bytes of a file.

    Raises:
        FileNotFoundError: there is no such file; with the remedy.
        ValueError: it is not a file, or cannot be read; with the remedy.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file. {remedy}")
    if not path.is_file():
        raise ValueError(f"{path}: not a file. {remedy}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}. {remedy}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"duplicate keys {', '.join(map(repr, twice[:3]))}")
    return found


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one per line; none if it does not exist.

    An incomplete last line, as a killed process leaves it, is skipped.

    Raises:
        ValueError: another line is not a JSON object.
    """
    text = read_bytes(path, "Remove it.").decode("utf-8", "replace") if path.exists() else ""
    lines = text.splitlines()
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            check_plain(value)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}: line {number} is not valid JSON: {reason(error)}. Remove the line."
            ) from error
        if not isinstance(value, dict):
            raise ValueError(f"{path}: line {number} is not a JSON object. Remove the line.")
        found.append(value)
    return found
