"""Read RUN/pareto.json, and check that it has the form in which `trainmerge pareto` writes it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainmerge.system.json_file import read_json

REMEDY = "Compute it again with `trainmerge pareto RUN`, or remove the file."


def read_front(path: Path) -> dict[str, Any]:
    """The contents of a front.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file; with the remedy.
    """
    content = read_json(path, REMEDY)
    if problem := _problem(content):
        raise ValueError(f"{path}: not a front of this version: {problem}. {REMEDY}")
    return content


def _problem(content: Mapping[str, Any]) -> str | None:
    tasks = content.get("tasks")
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) for task in tasks):
        return "`tasks` is not a list of names"
    if not isinstance(content.get("coefficients"), str):
        return "`coefficients` is not a checksum"
    for key, parts in (("front", ("scales", "losses")), ("measured", ("predicted",))):
        entries = content.get(key)
        if not isinstance(entries, list) or not entries:
            return f"`{key}` is not a list of merges"
        for entry in entries:
            if not isinstance(entry, dict) or not all(_numbers(entry.get(part), tasks) for part in parts):
                return f"an entry of `{key}` lacks {' or '.join(parts)} of some task"
    if not all(isinstance(entry.get("point"), int) for entry in content["front"]):
        return "an entry of `front` lacks its number, `point`"
    checks = content.get("checks")
    if not isinstance(checks, dict) or not all(
        _numbers(checks.get(task), ["rank_correlation"]) for task in tasks
    ):
        return "`checks` lacks the rank_correlation of some task"
    return None


def _numbers(value: Any, names: Sequence[str]) -> bool:
    """Whether `value` has a number for each name."""
    return isinstance(value, dict) and all(
        isinstance(value.get(name), int | float) and not isinstance(value[name], bool) for name in names
    )
