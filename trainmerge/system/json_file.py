"""Read JSON files, with errors that name the file."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON in UTF-8, or not an object; with the remedy.
    """
    value = read_value(path, remedy)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object, but a {type(value).__name__}. {remedy}")
    return value


def read_value(path: Path, remedy: str) -> Any:
    """The value in a JSON file. Raises as `read_json`, for any value."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}. {remedy}") from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one per line; none if it does not exist.

    An incomplete last line, as a killed process leaves it, is skipped.

    Raises:
        ValueError: another line is not a JSON object.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}: line {number} is not valid JSON: {error}. Remove the line.") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path}: line {number} is not a JSON object. Remove the line.")
        found.append(value)
    return found
